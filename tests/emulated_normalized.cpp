// The kernels of layer normalisation and peepholes, for emulated_step.cpp: a file of their own because
// they take long to compile.
#include "cuda/normalized_backward.cu"
#include "cuda/normalized_forward.cu"
