// NCCL communicators. One that a server took with it is made anew, behind the
// same handle, when the ranks have agreed on a new id
// (mnemosyne_proxy_reinit_comm).
#include <algorithm>
#include <cstring>

#include "proxy/client.h"

namespace mnemosyne::proxy {
namespace {

struct Comm {
  std::atomic<uint32_t> id = nextId();
  int num_ranks = 0;
  int rank = 0;
  NcclUniqueId first_id{};  // the same in all its ranks, and never another's
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
std::atomic<bool> are_closed{false};

void forget(Comm* comm) {
  std::lock_guard<std::mutex> lock(comms_mutex);
  std::erase(comms(), comm);
}

int init(Comm* comm, const NcclUniqueId& unique_id) {
  auto& connection = Connection::instance();
  const uint32_t id = comm->id;
  comm->generation = connection.generation();  // from now on it can be aborted
  if (are_closed) {
    comm->generation = 0;
    return kNcclRemoteError;
  }
  const int result = connection.call(CommandWriter(kNcclInit)
                                         .put(id)
                                         .put(comm->num_ranks)
                                         .put(unique_id)
                                         .put(comm->rank));
  comm->is_made = result == 0;
  if (result == 0) return 0;
  comm->generation = 0;
  return connection.isUsable() ? result : int{kNcclUnhandledCudaError};
}

// Ends whatever waits for its peers. Not by the ring, which may stand still
// behind this very communicator.
void abortIfOpen(Comm& comm) {
  auto& connection = Connection::instance();
  if (comm.generation.exchange(0) != connection.generation()) return;
  connection.tell({Control::kAbortComm, comm.id});
  comm.id = nextId();  // the abort may still be under way
}

int create(void** made, int num_ranks, const NcclUniqueId& unique_id,
           int rank) {
  auto comm = std::make_unique<Comm>();
  comm->num_ranks = num_ranks;
  comm->rank = rank;
  comm->first_id = unique_id;
  {
    std::lock_guard<std::mutex> lock(comms_mutex);
    comms().push_back(comm.get());
  }
  if (const int result = init(comm.get(), unique_id); result != 0) {
    forget(comm.get());
    return result;
  }
  *made = comm.release();
  return 0;
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
    connection.call(CommandWriter(kNcclDestroy).put(commOf(comm)->id.load()));
  }
  delete commOf(comm);
  return 0;
}

MNEMOSYNE_EXPORT int ncclCommAbort(void* comm) {
  if (comm == nullptr) return 0;
  forget(commOf(comm));
  abortIfOpen(*commOf(comm));
  delete commOf(comm);
  return 0;
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

// The communicators of this process, oldest first. `ids` gets 128 bytes for
// each, which are the same in all ranks of one communicator; returns how many
// there are.
MNEMOSYNE_EXPORT int mnemosyne_proxy_comms(void** handles, int* num_ranks,
                                           int* ranks, std::byte* ids,
                                           int capacity) {
  std::lock_guard<std::mutex> lock(comms_mutex);
  const int count = static_cast<int>(comms().size());
  for (int at = 0; at < std::min(count, capacity); ++at) {
    const Comm& comm = *comms()[at];
    handles[at] = comms()[at];
    num_ranks[at] = comm.num_ranks;
    ranks[at] = comm.rank;
    std::memcpy(ids + at * sizeof(NcclUniqueId), &comm.first_id,
                sizeof(NcclUniqueId));
  }
  return count;
}

// Makes the communicator behind `comm` anew; all its ranks do so with the same
// id. One that still lives here is aborted first. Returns an ncclResult_t.
MNEMOSYNE_EXPORT int mnemosyne_proxy_reinit_comm(void* comm,
                                                 const NcclUniqueId* id) {
  abortIfOpen(*commOf(comm));
  commOf(comm)->is_made = false;
  return init(commOf(comm), *id);
}

// Has nobody wait for other ranks any more: communicators are aborted, and
// refuse everything until they are made anew; none can be made until
// mnemosyne_proxy_admit_comms. `all`: if not, only those that are being made:
// nobody has their handles yet. Any thread.
MNEMOSYNE_EXPORT void mnemosyne_proxy_abort_comms(int all) {
  are_closed = true;
  std::lock_guard<std::mutex> lock(comms_mutex);
  for (Comm* comm : comms())
    if (all != 0 || !comm->is_made) abortIfOpen(*comm);
}

// An epoch has begun, in which all ranks can make communicators.
MNEMOSYNE_EXPORT void mnemosyne_proxy_admit_comms() { are_closed = false; }

// What is wrong with any communicator, an ncclResult_t. Errors of peers and of
// the network are no errors of the device, so nothing else tells them.
MNEMOSYNE_EXPORT int mnemosyne_proxy_comm_error() {
  {
    std::lock_guard<std::mutex> lock(comms_mutex);
    if (comms().empty()) return 0;
  }
  return Connection::instance().call(CommandWriter(kNcclErrors));
}
