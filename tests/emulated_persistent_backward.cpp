// The persistent backward kernels of all cells, for emulated_step.cpp: a file of their own because
// they take long to compile.
#include "cuda/persistent_elman_backward.cu"
#include "cuda/persistent_gru_backward.cu"
#include "cuda/persistent_gru_reset_before_backward.cu"
#include "cuda/persistent_lstm_backward.cu"
