// NCCL communicators. One ends with the server that has it.
#include <vector>

#include "proxy/client.h"

namespace mnemosyne::proxy {
namespace {

struct Comm {
  const uint32_t id = nextId();
  int num_ranks = 0;
  int rank = 0;
  std::atomic<uint64_t> generation{0};  // of the server that has it
  std::atomic<bool> is_made{false};
};

Comm* commOf(void* comm) { return static_cast<Comm*>(comm); }

std::mutex comms_mutex;
std::vector<Comm*>& comms() {
  static auto* all = new std::vector<Comm*>;
  return *all;
}

// Whether none may be made: a failure is known, and its epoch not over.
std::atomic<bool> are_refused{false};

void forget(Comm* comm) {
  std::lock_guard<std::mutex> lock(comms_mutex);
  std::erase(comms(), comm);
}

// Ends whatever waits for its peers. Not by the ring, which may stand still
// behind this very communicator.
void abortIfOpen(Comm& comm) {
  auto& connection = Connection::instance();
  if (comm.generation.exchange(0) == connection.generation())
    connection.tell({Control::kAbortComm, comm.id});
}

int create(void** made, int num_ranks, const NcclUniqueId& unique_id,
           int rank) {
  auto& connection = Connection::instance();
  auto comm = std::make_unique<Comm>();
  comm->num_ranks = num_ranks;
  comm->rank = rank;
  comm->generation = connection.generation();
  {
    std::lock_guard<std::mutex> lock(comms_mutex);
    comms().push_back(comm.get());  // from now on it can be aborted
  }
  const int result = are_refused ? int{kNcclRemoteError}
                                 : connection.call(CommandWriter(kNcclInit)
                                                       .put(comm->id)
                                                       .put(num_ranks)
                                                       .put(unique_id)
                                                       .put(rank));
  if (result == 0) {
    comm->is_made = true;
    *made = comm.release();
    return 0;
  }
  forget(comm.get());
  return connection.isUsable() ? result : int{kNcclUnhandledCudaError};
}

}  // namespace

void markLostComm();
int startGroup();
int endGroup();

uint32_t commId(void* comm) {
  if (commOf(comm)->generation != Connection::instance().generation())
    markLostComm();
  return commOf(comm)->id;
}

}  // namespace mnemosyne::proxy

using namespace mnemosyne::proxy;

MNEMOSYNE_EXPORT int ncclGetVersion(int* version) {
  Answer answer{version, sizeof *version};
  return Connection::instance().call(CommandWriter(kNcclVersion), &answer);
}

MNEMOSYNE_EXPORT int ncclGetUniqueId(NcclUniqueId* id) {
  Answer answer{id, sizeof *id};
  return Connection::instance().call(CommandWriter(kNcclUniqueId), &answer);
}

MNEMOSYNE_EXPORT int ncclCommInitRank(void** comm, int num_ranks,
                                      NcclUniqueId id, int rank) {
  return create(comm, num_ranks, id, rank);
}

MNEMOSYNE_EXPORT int ncclCommInitRankConfig(void** comm, int num_ranks,
                                            NcclUniqueId id, int rank, void*) {
  return create(comm, num_ranks, id, rank);
}

MNEMOSYNE_EXPORT int ncclCommInitRankScalable(void** comm, int num_ranks,
                                              int rank, int num_ids,
                                              NcclUniqueId* ids, void*) {
  if (num_ids != 1) return kNcclInvalidUsage;
  return create(comm, num_ranks, ids[0], rank);
}

MNEMOSYNE_EXPORT int ncclCommCount(void* comm, int* count) {
  *count = commOf(comm)->num_ranks;
  return 0;
}

MNEMOSYNE_EXPORT int ncclCommUserRank(void* comm, int* rank) {
  *rank = commOf(comm)->rank;
  return 0;
}

MNEMOSYNE_EXPORT int ncclCommCuDevice(void*, int* device) {
  *device = Connection::instance().chosen_device;
  return 0;
}

// NCCL's watchdog ends the process at an error; the program hears of it
// elsewhere.
MNEMOSYNE_EXPORT int ncclCommGetAsyncError(void*, int* error) {
  *error = 0;
  return 0;
}

MNEMOSYNE_EXPORT int ncclCommFinalize(void*) { return 0; }

// torch aborts one that could not be made, too, as NCCL lets it.
MNEMOSYNE_EXPORT int ncclCommDestroy(void* comm) {
  if (comm == nullptr) return 0;
  auto& connection = Connection::instance();
  forget(commOf(comm));
  if (connection.isUsable()) {
    connection.call(CommandWriter(kNcclDestroy).put(commOf(comm)->id));
  }
  delete commOf(comm);
  return 0;
}

MNEMOSYNE_EXPORT int ncclCommAbort(void* comm) {
  if (comm == nullptr) return 0;
  forget(commOf(comm));
  abortIfOpen(*commOf(comm));
  return 0;  // another thread may be using its record, which is small
}

MNEMOSYNE_EXPORT int ncclGroupStart() { return startGroup(); }
MNEMOSYNE_EXPORT int ncclGroupEnd() { return endGroup(); }

MNEMOSYNE_EXPORT const char* ncclGetErrorString(int code) {
  constexpr const char* kTexts[] = {"no error",         "unhandled cuda error",
                                    "system error",     "internal error",
                                    "invalid argument", "invalid usage",
                                    "remote error",     "in progress"};
  return code >= 0 && code < 8 ? kTexts[code] : "unknown result code";
}

MNEMOSYNE_EXPORT const char* ncclGetLastError(void*) { return ""; }

// Has no communicator made until mnemosyne_proxy_admit_comms; one that is being
// made is aborted: nobody has its handle yet. Any thread.
MNEMOSYNE_EXPORT void mnemosyne_proxy_refuse_comms() {
  are_refused = true;
  std::lock_guard<std::mutex> lock(comms_mutex);
  for (Comm* comm : comms())
    if (!comm->is_made) abortIfOpen(*comm);
}

// An epoch has begun, in which all ranks can make communicators.
MNEMOSYNE_EXPORT void mnemosyne_proxy_admit_comms() { are_refused = false; }

// What is wrong with any communicator, an ncclResult_t. Errors of peers and of
// the network are no errors of the device, so nothing else tells them.
MNEMOSYNE_EXPORT int mnemosyne_proxy_comm_error() {
  {
    std::lock_guard<std::mutex> lock(comms_mutex);
    if (comms().empty()) return 0;
  }
  return Connection::instance().call(CommandWriter(kNcclErrors));
}
