// The Python module mnemosyne_plugin.ccl._C.
#include <pybind11/chrono.h>
#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include <memory>
#include <string>
#include <vector>

#include "ccl/backend.h"
#include "ccl/backend_device.h"
#include "ccl/backend_store.h"
#include "ccl/mesh.h"
#include "common/error.h"

namespace py = pybind11;

namespace mnemosyne::ccl {
namespace {

// The classes are in Python; the names are the same.
py::object toPython(const char* name, const Error& error) {
  py::object type = py::module_::import("mnemosyne_plugin.errors").attr(name);
  py::object instance = type(error.what());
  instance.attr("rank") = error.rank();
  instance.attr("epoch") = error.epoch();
  return instance;
}

py::object toPython(const std::exception_ptr& pointer) {
  if (!pointer) return py::none();
  try {
    std::rethrow_exception(pointer);
  } catch (const PeerLost& error) {
    return toPython("PeerLost", error);
  } catch (const CollectiveTimeout& error) {
    return toPython("CollectiveTimeout", error);
  } catch (const StaleEpoch& error) {
    return toPython("StaleEpoch", error);
  } catch (const CollectiveMismatch& error) {
    return toPython("CollectiveMismatch", error);
  } catch (const GroupAborted& error) {
    return toPython("GroupAborted", error);
  } catch (const ConfigError& error) {
    return toPython("ConfigError", error);
  } catch (const std::exception& error) {
    return py::module_::import("mnemosyne_plugin.errors")
        .attr("MnemosyneError")(error.what());
  }
}

// Also serves torch's own bindings: it is their Work.wait that throws ours.
void translate(std::exception_ptr pointer) {
  if (!pointer) return;
  try {
    std::rethrow_exception(pointer);
  } catch (const Error&) {
    const py::object instance = toPython(pointer);
    PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(instance.ptr())),
                    instance.ptr());
  }
}

Milliseconds toMilliseconds(double seconds) {
  constexpr double kForever =
      1e9;  // half a life; more would overflow the clock
  return Milliseconds(
      static_cast<int64_t>(std::min(seconds, kForever) * 1000.0));
}

std::shared_ptr<Mesh> makeMesh(uint64_t worker_id, std::string secret,
                               const std::string& bind_host, bool use_shm) {
  auto* mesh = new Mesh(worker_id, std::move(secret), bind_host, use_shm);
  return std::shared_ptr<Mesh>(mesh, [](Mesh* last) {
    if (last->isInherited()) return;
    // Its end waits for callbacks, which may wait for the interpreter's lock.
    if (Py_IsInitialized() && PyGILState_Check()) {
      const py::gil_scoped_release release;
      delete last;
    } else {
      delete last;
    }
  });
}

int reconfigure(Mesh& mesh, int64_t epoch, int rank,
                const std::vector<std::pair<uint64_t, std::string>>& members) {
  std::vector<Mesh::Member> list;
  for (const auto& [worker_id, address] : members)
    list.push_back({worker_id, address});
  return mesh.reconfigure(epoch, rank, std::move(list));
}

py::list pending(Mesh& mesh) {
  std::vector<Mesh::Pending> all;
  {
    const py::gil_scoped_release release;
    all = mesh.pending();
  }
  py::list list;
  for (const Mesh::Pending& each : all)
    list.append(py::make_tuple(
        name(each.kind), each.group, each.sequence, each.num_bytes,
        each.type_name,
        std::chrono::duration<double>(Clock::now() - each.began).count(),
        each.timeout.count() / 1000.0, each.waits_for));
  return list;
}

const char* name(Outcome outcome) {
  switch (outcome) {
    case Outcome::kCompleted:
      return "completed";
    case Outcome::kFailed:
      return "failed";
    case Outcome::kAbsorbed:
      return "absorbed";
  }
  return "unknown";
}

// Times as time.time() has them, so that those of several ranks compare.
py::list finished(Mesh& mesh) {
  std::vector<Finished> all;
  {
    const py::gil_scoped_release release;
    all = mesh.finished();
  }
  const auto now = Clock::now();
  const auto wall = std::chrono::system_clock::now().time_since_epoch();
  const auto timeOf = [&](Clock::time_point at) {
    return std::chrono::duration<double>(wall - (now - at)).count();
  };
  py::list list;
  for (const Finished& each : all)
    list.append(py::make_tuple(name(each.kind), each.group->name(),
                               each.sequence, each.num_bytes, each.type_name,
                               name(each.outcome), timeOf(each.began),
                               timeOf(each.ended), each.error));
  return list;
}

std::shared_ptr<Group> makeGroup(Mesh& mesh, const std::string& name,
                                 std::vector<int> ranks, double timeout_s,
                                 bool absorb, int64_t uuid) {
  auto group = std::make_shared<Group>(name, std::move(ranks), mesh.rank(),
                                       toMilliseconds(timeout_s), absorb, uuid);
  mesh.adopt(*group);
  return group;
}

c10::intrusive_ptr<MnemosyneBackend> createGroup(std::shared_ptr<Mesh> mesh,
                                                 const std::string& name,
                                                 std::vector<int> ranks,
                                                 double timeout_s, bool absorb,
                                                 bool is_world, int64_t uuid) {
  auto group =
      makeGroup(*mesh, name, std::move(ranks), timeout_s, absorb, uuid);
  return c10::make_intrusive<MnemosyneBackend>(std::move(mesh),
                                               std::move(group), is_world);
}

c10::intrusive_ptr<DeviceBackend> createDeviceGroup(
    std::shared_ptr<Mesh> mesh, const std::string& name, std::vector<int> ranks,
    double timeout_s, bool is_world, int64_t uuid, const std::string& device,
    Inner::Make make, Inner::Meet meet) {
  auto group = makeGroup(*mesh, name, std::move(ranks), timeout_s, true, uuid);
  return c10::make_intrusive<DeviceBackend>(
      std::move(mesh), std::move(group), is_world, c10::Device(device).type(),
      std::move(make), std::move(meet));
}

py::tuple standingOf(const DeviceBackend& backend) {
  Inner::Standing now;
  {
    const py::gil_scoped_release release;
    now = backend.inner().standing();
  }
  return py::make_tuple(now.life, now.is_quiet, now.collectives, now.sent,
                        now.received);
}

// Before torch 2.14 a ProcessGroup has a rank and a size of its own, beside
// those of its backend, and they are constant.
struct Place : c10d::ProcessGroup {
  static void set(c10d::ProcessGroup& group, int rank, int size) {
    const_cast<int&>(group.*(&Place::rank_)) = rank;
    const_cast<int&>(group.*(&Place::size_)) = size;
  }
};

}  // namespace
}  // namespace mnemosyne::ccl

PYBIND11_MODULE(_C, m) {
  using namespace mnemosyne::ccl;  // NOLINT: this is the module's only function
  using NoGil = py::call_guard<py::gil_scoped_release>;

  // The base class that torch registers.
  py::module_::import("torch._C._distributed_c10d");
  py::register_exception_translator(&translate);

  py::class_<Mesh, std::shared_ptr<Mesh>>(m, "Mesh")
      .def(py::init(&makeMesh), py::arg("worker_id"), py::arg("secret"),
           py::arg("bind_host"), py::arg("use_shm"), NoGil())
      .def_property_readonly("address", &Mesh::address)
      .def_property_readonly("failure_fd", &Mesh::failureFd)
      .def_property_readonly("epoch", &Mesh::currentEpoch)
      .def_property_readonly("rank", &Mesh::rank)
      .def_property_readonly("world_size", &Mesh::worldSize)
      .def("reconfigure", &reconfigure, NoGil())
      .def("fence", &Mesh::fence, NoGil())
      .def("failure", [](const Mesh& mesh) { return toPython(mesh.failure()); })
      .def("absorb", &Mesh::absorb, NoGil())
      .def_property_readonly("absorbs_failure", &Mesh::absorbsFailure)
      .def("start_recording", &Mesh::startRecording, NoGil())
      .def("stop_recording",
           [](Mesh& mesh) {
             std::string text;
             {
               const py::gil_scoped_release release;
               text = mesh.stopRecording();
             }
             return py::bytes(text);
           })
      .def("start_replay",
           [](Mesh& mesh, const py::bytes& log) {
             const std::string text = log;
             const py::gil_scoped_release release;
             mesh.startReplay(text);
           })
      .def("hold_replay", &Mesh::holdReplay, NoGil())
      .def("stop_replay", &Mesh::stopReplay, NoGil())
      .def("lock_membership", &Mesh::lockMembership)
      .def("counters", &Mesh::counters)
      .def("pending", &pending)
      .def("finished", &finished)
      .def("close", &Mesh::close, NoGil());

  py::class_<MnemosyneBackend, c10d::Backend,
             c10::intrusive_ptr<MnemosyneBackend>>(m, "MnemosyneBackend")
      .def_property_readonly("supports_reconfigure",
                             &MnemosyneBackend::supportsReconfigure)
      .def("get_reconfigure_handle", &MnemosyneBackend::get_reconfigure_handle,
           NoGil())
      .def("reconfigure", &MnemosyneBackend::reconfigure, py::arg("opts"),
           NoGil())
      .def("reseat", &MnemosyneBackend::reseat, py::arg("global_ranks"),
           NoGil())
      // Where ranks are bound to devices, new_group asks this of the ranks that
      // are not in the new group. We need nothing of them.
      .def("perform_nocolor_split", [](MnemosyneBackend&, const at::Device&) {})
      .def_property_readonly("global_ranks",
                             [](const MnemosyneBackend& backend) {
                               return backend.group()->globalRanks();
                             });
  py::class_<DeviceBackend, MnemosyneBackend,
             c10::intrusive_ptr<DeviceBackend>>(m, "DeviceBackend")
      .def_property_readonly(
          "key",
          [](const DeviceBackend& backend) { return backend.group()->id(); })
      .def_property_readonly("inner",
                             [](const DeviceBackend& backend) {
                               const py::gil_scoped_release release;
                               return backend.inner().current();
                             })
      .def_property_readonly(
          "group_name",
          [](const DeviceBackend& backend) { return backend.group()->name(); })
      .def("standing", &standingOf)
      .def_property_readonly("num_captured",
                             [](const DeviceBackend& backend) {
                               const py::gil_scoped_release release;
                               return backend.inner().numCaptured();
                             })
      .def("connect", &DeviceBackend::connect, py::arg("first"), NoGil())
      .def("look", &DeviceBackend::look, NoGil())
      .def(
          "abort_inner_if_busy",
          [](const DeviceBackend& backend) { backend.inner().abortIfBusy(); },
          NoGil())
      .def(
          "abort_inner",
          [](const DeviceBackend& backend) { backend.inner().abort(); },
          NoGil())
      .def(
          "drop_inner",
          [](const DeviceBackend& backend) { backend.inner().drop(); },
          NoGil());
  py::class_<FencedStore, c10d::PrefixStore, c10::intrusive_ptr<FencedStore>>(
      m, "FencedStore")
      .def(py::init<std::string, const c10::intrusive_ptr<c10d::Store>&,
                    std::shared_ptr<Mesh>>());
  m.def("set_capturing", &Inner::setCapturing);
  m.def("create_group", &createGroup, NoGil());
  m.def("create_device_group", &createDeviceGroup, NoGil());
#ifdef C10D_BACKEND_HAS_RECONFIGURE
  m.attr("ReconfigureOptions") =
      py::module_::import("torch._C._distributed_c10d")
          .attr("ReconfigureOptions");
#else
  m.def("set_place", &Place::set);
  py::class_<ReconfigureOptions>(m, "ReconfigureOptions")
      .def(py::init<>())
      .def_readwrite("uuid", &ReconfigureOptions::uuid)
      .def_readwrite("handles", &ReconfigureOptions::handles)
      .def_readwrite("timeout", &ReconfigureOptions::timeout)
      .def_readwrite("hints", &ReconfigureOptions::hints);
#endif
}
