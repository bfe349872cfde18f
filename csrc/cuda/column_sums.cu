// Sums over the rows of a matrix, for the gradients of biases: without atomics, in an order that
// depends on nothing but the number of rows.
#include "step.cuh"

namespace rnn_ext::cuda {
namespace {

// A block sums kChunk rows of kColumns columns, each of kLines threads a column every kLines-th row
// of the chunk.
constexpr int kChunk = 256, kColumns = 32, kLines = 8;

struct ChunkSums {
  int64_t rows, columns, row_stride;
  const void* from;  // In [rows, columns]
  void* to;          // Out [chunks, columns]
};

int64_t chunks(int64_t rows) { return rows > kChunk ? divided_up(rows, kChunk) : 1; }

// Reads a matrix, writes a row of sums for each chunk of its rows. Parallel over chunks, columns
// and lines of a chunk.
template <class In, class Out>
__global__ void __launch_bounds__(kColumns* kLines) sum_chunks_kernel(const ChunkSums p) {
  using R = Real<In>;
  R* sums = reinterpret_cast<R*>(shared_memory());  // [kLines][kColumns]
  const unsigned across = static_cast<unsigned>((p.columns + kColumns - 1) / kColumns);
  const int64_t chunk = blockIdx.x / across, first = chunk * kChunk;
  const int64_t column =
      static_cast<int64_t>(blockIdx.x % across) * kColumns + threadIdx.x % kColumns;
  const int64_t last = first + kChunk < p.rows ? first + kChunk : p.rows;
  R sum = 0;
  if (column < p.columns)
    for (int64_t row = first + threadIdx.x / kColumns; row < last; row += kLines)
      sum += load<In>(p.from, row * p.row_stride + column);
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x >= kColumns || column >= p.columns) return;
  for (int line = 1; line < kLines; line++) sum += sums[line * kColumns + threadIdx.x];
  store<Out>(p.to, chunk * p.columns + column, sum);
}

template <class In, class Out>
void sum_chunks(const ChunkSums& p, const Stream& stream) {
  constexpr int threads = kColumns * kLines;
  const int64_t blocks = chunks(p.rows) * divided_up(p.columns, kColumns);
  launch_blocks("column_sums", sum_chunks_kernel<In, Out>, blocks, threads,
                threads * sizeof(Real<In>), stream, p);
}

}  // namespace

// The sums of chunks, and the sums of chunks of those: two buffers in turn.
int64_t column_sums_scratch(int64_t rows) { return chunks(rows) + chunks(chunks(rows)); }

void column_sums(Storage storage, const ColumnSums& p, const Stream& stream) {
  with_storage(storage, [&](auto zero) {
    using S = decltype(zero);
    using R = Real<S>;
    ChunkSums step{p.rows, p.columns, p.row_stride, p.matrix, p.sums};
    if (chunks(p.rows) == 1) return sum_chunks<S, S>(step, stream);
    R* const first = static_cast<R*>(p.scratch);
    R* const second = first + chunks(p.rows) * p.columns;
    step.to = first;
    sum_chunks<S, R>(step, stream);
    while (chunks(chunks(step.rows)) > 1) {
      step = {chunks(step.rows), p.columns, p.columns, step.to, step.to == first ? second : first};
      sum_chunks<R, R>(step, stream);
    }
    step = {chunks(step.rows), p.columns, p.columns, step.to, p.sums};
    sum_chunks<R, S>(step, stream);
  });
}

}  // namespace rnn_ext::cuda
