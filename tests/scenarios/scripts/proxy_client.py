"""Uses a device as the lines of its input say, and answers each with a line."""

import ctypes
import os
import signal
import sys

cuda = ctypes.CDLL(None)
cuda.mnemosyne_proxy_take_trace.restype = ctypes.c_uint64


def memory_bytes() -> int:
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    assert cuda.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)) == 0
    return total.value


def answer(word: str, *rest: str) -> int:
    if word == "count":
        number = ctypes.c_int()
        return int(cuda.cudaGetDeviceCount(ctypes.byref(number)))
    if word == "choose":
        return int(cuda.cudaSetDevice(int(rest[0])))
    if word == "devices":
        number = ctypes.c_int()
        assert cuda.cudaGetDeviceCount(ctypes.byref(number)) == 0
        return number.value
    if word == "serial":  # of the emulated device with that number here
        uuid = ctypes.create_string_buffer(16)
        error = int(cuda.cuDeviceGetUuid(uuid, int(rest[0])))
        return int(uuid.raw[9:]) if error == 0 else -error
    if word == "allocate":
        address = ctypes.c_void_p()
        return int(cuda.cudaMalloc(ctypes.byref(address), ctypes.c_size_t(1 << 20)))
    if word == "fill":
        address = ctypes.c_void_p(0x600000000000)  # of the first allocation
        return int(cuda.cudaMemset(address, 1, ctypes.c_size_t(int(rest[0]))))
    if word == "trace":
        return int(cuda.mnemosyne_proxy_take_trace())
    if word == "memory":
        return memory_bytes()
    if word == "load":
        ctypes.CDLL(rest[0])
        return 0
    if word == "set":
        os.environ["MNEMOSYNE_EMULATED"] = rest[0]
        return 0
    if word == "lose":
        cuda.mnemosyne_proxy_kill()
        return int(cuda.cudaDeviceSynchronize())
    if word == "recover":
        return int(cuda.mnemosyne_proxy_recover(30_000))
    if word == "fork":
        pid = os.fork()
        if pid == 0:
            signal.pause()
        return pid
    assert word == "server"
    return int(cuda.mnemosyne_proxy_server_pid())


for line in sys.stdin:
    print(answer(*line.split()), flush=True)
