// Flash attention (pytorch_flash), of bfloat16 and without dropout. On a GPU
// three kernels make the gradients; here the one in the middle does it all.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels.h"
#include "types.h"

namespace mnemosyne::torch_kernels {
namespace {

using proxy::emulated::Launch;
using proxy::emulated::onHost;

// Flash_fwd_params and Flash_bwd_params, of which only some is used.
struct Forward {
  const Bfloat16 *q, *k, *v;
  int64_t q_batch, k_batch, v_batch, q_row, k_row, v_row, q_head, k_head,
      v_head;
  int num_heads, num_kv_heads, heads_per_kv_head;
  Bfloat16* o;
  float* o_accumulated;
  int64_t o_batch, o_row, o_head;
  void* p;
  float* log_sums;
  float* log_sums_accumulated;
  int batch, num_q, num_k, num_new, width, num_q_rounded, num_k_rounded,
      width_rounded, rotary, total_q;
  float scale, scale_log2;
  char sequences[148];
  float kept;  // of dropout
  char rest[64];
  bool is_bfloat16, is_causal, others[2];
  char end[28];
};
static_assert(sizeof(Forward) == 472);

struct Backward {
  Forward forward;
  const Bfloat16* d_o;
  Bfloat16 *dq, *dk, *dv;
  float *dq_accumulated, *dk_accumulated, *dv_accumulated;
  int64_t o_batch, o_row, o_head;
  int64_t q_batch, k_batch, v_batch, q_row, k_row, v_row, q_head, k_head,
      v_head;
  float* products;
  bool is_deterministic;
  int64_t split_stride;
};
static_assert(sizeof(Backward) == 648);

bool isSupported(const Launch& launch, const Forward& by) {
  const bool is_supported = by.is_bfloat16 && by.kept == 1;
  if (!is_supported) launch.fail(proxy::kCudaNotSupported);
  return is_supported;
}

// How many keys the query of this row sees.
int numSeen(const Forward& by, int row) {
  if (!by.is_causal) return by.num_k;
  return std::max(0, std::min(by.num_k, row + 1 + by.num_k - by.num_q));
}

float dot(const Bfloat16* a, const Bfloat16* b, int size) {
  float sum = 0;
  for (int i = 0; i < size; ++i) sum += a[i] * b[i];
  return sum;
}

void attend(const Forward& by, int batch, int head) {
  const int kv_head = head / by.heads_per_kv_head;
  const Bfloat16* const k = by.k + batch * by.k_batch + kv_head * by.k_head;
  const Bfloat16* const v = by.v + batch * by.v_batch + kv_head * by.v_head;
  float* const log_sums =
      by.log_sums + (batch * by.num_heads + head) * int64_t{by.num_q};
  std::vector<float> weights(by.num_k), sums(by.width);
  for (int row = 0; row < by.num_q; ++row) {
    const Bfloat16* const q =
        by.q + batch * by.q_batch + head * by.q_head + row * by.q_row;
    Bfloat16* const o =
        by.o + batch * by.o_batch + head * by.o_head + row * by.o_row;
    const int num_seen = numSeen(by, row);
    float most = -std::numeric_limits<float>::infinity(), total = 0;
    for (int i = 0; i < num_seen; ++i) {
      weights[i] = by.scale * dot(q, k + i * by.k_row, by.width);
      most = std::max(most, weights[i]);
    }
    sums.assign(by.width, 0);
    for (int i = 0; i < num_seen; ++i) {
      const float weight = std::exp(weights[i] - most);
      total += weight;
      for (int j = 0; j < by.width; ++j) {
        sums[j] += weight * v[i * by.v_row + j];
      }
    }
    for (int j = 0; j < by.width; ++j) {
      o[j] = Bfloat16(num_seen > 0 ? sums[j] / total : 0);
    }
    log_sums[row] = num_seen > 0 ? most + std::log(total)
                                 : std::numeric_limits<float>::infinity();
  }
}

void forward(const Launch& launch, const Forward& by) {
  if (!isSupported(launch, by)) return;
  for (int batch = 0; batch < by.batch; ++batch) {
    for (int head = 0; head < by.num_heads; ++head) attend(by, batch, head);
  }
}

void attendBackward(const Backward& to, int batch, int head) {
  const Forward& by = to.forward;
  const int width = by.width;
  const int kv_head = head / by.heads_per_kv_head;
  const Bfloat16* const k = by.k + batch * by.k_batch + kv_head * by.k_head;
  const Bfloat16* const v = by.v + batch * by.v_batch + kv_head * by.v_head;
  const float* const log_sums =
      by.log_sums + (batch * by.num_heads + head) * int64_t{by.num_q};
  std::vector<float> dk(by.num_k * width), dv(by.num_k * width), dq(width);
  for (int row = 0; row < by.num_q; ++row) {
    const Bfloat16* const q =
        by.q + batch * by.q_batch + head * by.q_head + row * by.q_row;
    const Bfloat16* const o =
        by.o + batch * by.o_batch + head * by.o_head + row * by.o_row;
    const Bfloat16* const d_o =
        to.d_o + batch * to.o_batch + head * to.o_head + row * to.o_row;
    const float product = dot(d_o, o, width);
    dq.assign(width, 0);
    for (int i = 0; i < numSeen(by, row); ++i) {
      const Bfloat16* const key = k + i * by.k_row;
      const float weight =
          std::exp(by.scale * dot(q, key, width) - log_sums[row]);
      const float slope =
          by.scale * weight * (dot(d_o, v + i * by.v_row, width) - product);
      for (int j = 0; j < width; ++j) {
        dq[j] += slope * key[j];
        dk[i * width + j] += slope * q[j];
        dv[i * width + j] += weight * d_o[j];
      }
    }
    Bfloat16* const out =
        to.dq + batch * to.q_batch + head * to.q_head + row * to.q_row;
    for (int j = 0; j < width; ++j) out[j] = Bfloat16(dq[j]);
  }
  // One for each head of the queries; torch adds them up.
  Bfloat16* const out_k = to.dk + batch * to.k_batch + head * to.k_head;
  Bfloat16* const out_v = to.dv + batch * to.v_batch + head * to.v_head;
  for (int i = 0; i < by.num_k; ++i) {
    for (int j = 0; j < width; ++j) {
      out_k[i * to.k_row + j] = Bfloat16(dk[i * width + j]);
      out_v[i * to.v_row + j] = Bfloat16(dv[i * width + j]);
    }
  }
}

void backward(const Launch& launch, const Backward& by) {
  if (!isSupported(launch, by.forward)) return;
  for (int batch = 0; batch < by.forward.batch; ++batch) {
    for (int head = 0; head < by.forward.num_heads; ++head) {
      attendBackward(by, batch, head);
    }
  }
}

void prepare(const Launch&, const Backward&) {}
void finish(const Launch&, const Backward&, int) {}

}  // namespace

void addAttention(RegisterKernel* add_to) {
  add_to("_ZN13pytorch_flash16flash_fwd_kernel*", onHost<forward>);
  add_to("_ZN13pytorch_flash25flash_bwd_dot_do_o_kernel*", onHost<prepare>);
  add_to("_ZN13pytorch_flash44flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel*",
         onHost<backward>);
  add_to("_ZN13pytorch_flash27flash_bwd_convert_dq_kernel*", onHost<finish>);
}

}  // namespace mnemosyne::torch_kernels
