// The persistent forward kernels of all cells, for emulated_step.cpp: a file of their own because
// they take long to compile.
#include "cuda/persistent_elman_forward.cu"
#include "cuda/persistent_gru_forward.cu"
#include "cuda/persistent_gru_reset_before_forward.cu"
#include "cuda/persistent_lstm_forward.cu"
#include "cuda/plan.cpp"
