// What stands in front of a function that carries NVIDIA's name.
#pragma once

#define MNEMOSYNE_EXPORT extern "C" __attribute__((visibility("default")))
