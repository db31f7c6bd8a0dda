// A store in which nobody waits for a rank that is lost.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include <torch/csrc/distributed/c10d/PrefixStore.hpp>

#include "ccl/mesh.h"

namespace mnemosyne::ccl {

class FencedStore final : public c10d::PrefixStore {
 public:
  // `store` is cloned: a wait keeps its connection from others.
  FencedStore(std::string prefix, const c10::intrusive_ptr<c10d::Store>& store,
              std::shared_ptr<Mesh> mesh)
      : c10d::PrefixStore(std::move(prefix), store->clone()),
        mesh_(std::move(mesh)) {}

  // Throws the mesh's failure once there is one.
  std::vector<uint8_t> get(const std::string& key) override;
  void wait(const std::vector<std::string>& keys) override;
  void wait(const std::vector<std::string>& keys,
            const std::chrono::milliseconds& timeout) override;

 private:
  const std::shared_ptr<Mesh> mesh_;
};

}  // namespace mnemosyne::ccl
