// The prototypes of the forwarded functions against NVIDIA's headers. Nothing
// runs: that this compiles is the test.
#include <cublas_v2.h>
#include <nccl.h>

#include <type_traits>

#include "generated_opcodes.h"

namespace mnemosyne::testing {

// Whether an argument that we declare as `Ours` is passed as NVIDIA's `Theirs`.
// A pointer of ours says to what it points only where its role does.
template <typename Ours, typename Theirs>
constexpr bool isSameArgument() {
  if constexpr (std::is_pointer_v<Ours> && std::is_pointer_v<Theirs>) {
    using OurValue = std::remove_pointer_t<Ours>;
    using TheirValue = std::remove_pointer_t<Theirs>;
    if constexpr (std::is_void_v<OurValue>) {
      return !std::is_const_v<OurValue> || std::is_const_v<TheirValue>;
    } else {
      return sizeof(OurValue) == sizeof(TheirValue) &&
             std::is_const_v<OurValue> == std::is_const_v<TheirValue>;
    }
  } else if constexpr (std::is_pointer_v<Ours> || std::is_pointer_v<Theirs>) {
    return false;
  } else if constexpr (std::is_enum_v<Theirs>) {
    return std::is_same_v<Ours, int> && sizeof(Theirs) == sizeof(int);
  } else {
    return sizeof(Ours) == sizeof(Theirs) &&
           std::is_floating_point_v<Ours> == std::is_floating_point_v<Theirs> &&
           std::is_signed_v<Ours> == std::is_signed_v<Theirs>;
  }
}

template <typename Ours, typename Theirs>
struct IsSame : std::false_type {};
template <typename... Ours, typename Status, typename... Theirs>
  requires(sizeof...(Ours) == sizeof...(Theirs))
struct IsSame<int(Ours...), Status (*)(Theirs...)>
    : std::bool_constant<sizeof(Status) == sizeof(int) &&
                         (isSameArgument<Ours, Theirs>() && ...)> {};

// C++ has a second one of each, with the type of computation of older releases.
constexpr cublasStatus_t (*cublasGemmEx)(cublasHandle_t, cublasOperation_t,
                                         cublasOperation_t, int, int, int,
                                         const void*, const void*, cudaDataType,
                                         int, const void*, cudaDataType, int,
                                         const void*, void*, cudaDataType, int,
                                         cublasComputeType_t,
                                         cublasGemmAlgo_t) = &::cublasGemmEx;
constexpr cublasStatus_t (*cublasGemmStridedBatchedEx)(
    cublasHandle_t, cublasOperation_t, cublasOperation_t, int, int, int,
    const void*, const void*, cudaDataType, int, long long, const void*,
    cudaDataType, int, long long, const void*, void*, cudaDataType, int,
    long long, int, cublasComputeType_t,
    cublasGemmAlgo_t) = &::cublasGemmStridedBatchedEx;

#define SAME(library, name)                                            \
  static_assert(                                                       \
      IsSame<proxy::types::name, std::decay_t<decltype(name)>>::value, \
      #name " is declared otherwise in NVIDIA's header");
MNEMOSYNE_FORWARD(SAME)

// What forward.h and cuda_abi.h say in numbers.
static_assert(CUBLAS_COMPUTE_16F == 64 && CUBLAS_COMPUTE_16F_PEDANTIC == 65);
static_assert(CUBLAS_COMPUTE_32F == 68 && CUBLAS_COMPUTE_32F_PEDANTIC == 69);
static_assert(CUBLAS_COMPUTE_32F_FAST_16F == 74 &&
              CUBLAS_COMPUTE_32F_FAST_16BF == 75 &&
              CUBLAS_COMPUTE_32F_FAST_TF32 == 77);
static_assert(CUBLAS_COMPUTE_64F == 70 && CUBLAS_COMPUTE_64F_PEDANTIC == 71);
static_assert(CUBLAS_COMPUTE_32I == 72 && CUBLAS_COMPUTE_32I_PEDANTIC == 73);
static_assert(CUBLAS_COMPUTE_32F_EMULATED_16BFX9 == 78 &&
              CUBLAS_COMPUTE_64F_EMULATED_FIXEDPOINT == 79);
static_assert(CUDA_C_32F == 4 && CUDA_C_64F == 5);
static_assert(CUBLAS_POINTER_MODE_HOST == 0 && CUBLAS_POINTER_MODE_DEVICE == 1);
static_assert(CUBLAS_STATUS_NOT_INITIALIZED == 1 &&
              CUBLAS_STATUS_INVALID_VALUE == 7 &&
              CUBLAS_STATUS_NOT_SUPPORTED == 15);
static_assert(ncclInvalidArgument == 4 && ncclInvalidUsage == 5);

}  // namespace mnemosyne::testing

int main() {}
