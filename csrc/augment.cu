// GPU driver of augment.h. One block of threads makes one view of one image; each operation reads the picture from one
// half of the shared memory and writes it to the other.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "augment.h"

namespace rcmstr {
namespace {

constexpr int THREADS = 512;  // pictures of 32x100 (sm_90: also 32x128) leave room for two blocks a multiprocessor
constexpr int WARP = 32, WARPS = THREADS / WARP;

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("augment_views: ") + what + ": " + cudaGetErrorString(error));
}

__global__ void draw_kernel(const int64_t* index, float* rows, int64_t batch, uint64_t seed, uint32_t epoch,
                            uint32_t first_stream, Preset preset) {
  const int64_t image = blockIdx.x, item = int64_t(blockIdx.y) * batch + image;
  const Stream stream(seed, first_stream + blockIdx.y, epoch, static_cast<uint64_t>(index[image]));
  float* const row = rows + item * ROW_SIZE;
  if (threadIdx.x == 0) draw_order(stream, preset, row);
  if (threadIdx.x == WARP) {
    draw_box(stream, preset, row);
    draw_jitter_order(stream, row);
    row[ROW_RADIUS] = preset.radius;
  }
  for (int slot = ROW_CONTRAST + threadIdx.x; slot < ROW_JITTER_ORDER; slot += blockDim.x)
    row[slot] = draw_number(stream, preset, slot);
}

// A picture in shared memory; every thread of the block calls each function, which reads `from` and writes `to`.
// Warps take lines and their threads every 32nd float, so that no position has to be divided by the width.
struct Picture {
  int height, width;

  __device__ int size() const { return height * width * CHANNELS; }
  __device__ int line() const { return width * CHANNELS; }

  __device__ void warp(const float* from, float* to, const float* row, const Prepared& prepared, int first,
                       int last) const {
    const float half_y = 0.5f / static_cast<float>(height), half_x = 0.5f / static_cast<float>(width);
    for (int i = threadIdx.x; i < height * width; i += THREADS) {
      Position at = {(static_cast<float>(i / width) + 0.5f) / static_cast<float>(height),
                     (static_cast<float>(i % width) + 0.5f) / static_cast<float>(width)};
      for (int k = last; k >= first; --k)
        at = source_position(static_cast<int>(row[ROW_ORDER + k]), row, prepared, at, half_y, half_x);
      sample(from, height, width, at, to + CHANNELS * i);
    }
  }

  // The radius is known when compiled, so that weights and places of lines stay in registers.
  template <int radius>
  __device__ void blur_columns(const float* from, float* to, const float (&taps)[radius + 1]) const {
    for (int y = threadIdx.x / WARP; y < height; y += WARPS) {
      int before[radius + 1], after[radius + 1];
      for (int k = 0; k <= radius; ++k) {
        before[k] = max(y - k, 0) * line();
        after[k] = min(y + k, height - 1) * line();
      }
      for (int i = threadIdx.x % WARP; i < line(); i += WARP) {
        float sum = taps[0] * from[before[0] + i];
        for (int k = 1; k <= radius; ++k) sum += taps[k] * (from[before[k] + i] + from[after[k] + i]);
        to[before[0] + i] = sum;
      }
    }
  }

  template <int radius>
  __device__ void blur_rows(const float* from, float* to, const float (&taps)[radius + 1]) const {
    for (int y = threadIdx.x / WARP; y < height; y += WARPS)
      for (int i = threadIdx.x % WARP; i < line(); i += WARP) {
        const int x = i / CHANNELS;
        const float* at = from + y * line() + i;
        float sum = taps[0] * at[0];
        for (int k = 1; k <= radius; ++k)
          sum += taps[k] * (at[-CHANNELS * min(k, x)] + at[CHANNELS * min(k, width - 1 - x)]);
        to[y * line() + i] = sum;
      }
  }

  // Both directions; the result is in `from` again.
  template <int radius>
  __device__ void blur_with(float* from, float* to, const Prepared& p) const {
    float taps[radius + 1];
    for (int k = 0; k <= radius; ++k) taps[k] = p.taps[k];
    blur_columns<radius>(from, to, taps);
    __syncthreads();
    blur_rows<radius>(to, from, taps);
    __syncthreads();
  }

  __device__ void blur(float* from, float* to, const Prepared& p) const {
    static_assert(MAX_RADIUS == 6);
    if (p.radius <= 2) return blur_with<2>(from, to, p);
    if (p.radius == 3) return blur_with<3>(from, to, p);
    if (p.radius == 4) return blur_with<4>(from, to, p);
    if (p.radius == 5) return blur_with<5>(from, to, p);
    blur_with<6>(from, to, p);
  }

  __device__ void sharpen(const float* from, float* to, const Sharpening& sharpened) const {
    for (int y = threadIdx.x / WARP; y < height; y += WARPS) {
      const int up = y > 0 ? -line() : 0, down = y < height - 1 ? line() : 0;
      for (int i = threadIdx.x % WARP; i < line(); i += WARP) {
        const int x = i / CHANNELS;
        const int left = x > 0 ? -CHANNELS : 0, right = x < width - 1 ? CHANNELS : 0;
        const float* at = from + y * line() + i;
        const float neighbourhood = at[up + left] + at[up] + at[up + right] + at[left] + at[0] + at[right] +
                                    at[down + left] + at[down] + at[down + right];
        to[y * line() + i] = sharpened(at[0], neighbourhood);
      }
    }
  }

  // f of every pixel, in place; every thread keeps to its own. f takes grey levels where `levels` are those of `image`.
  template <class Recolour>
  __device__ void recolour(float* image, Levels levels, const Recolour& f) const {
    for (int i = threadIdx.x; i < height * width; i += THREADS) {
      float* const p = image + CHANNELS * i;
      const Colour made = f(Colour{at_levels(p[0], levels), at_levels(p[1], levels), at_levels(p[2], levels)});
      p[0] = made.red;
      p[1] = made.green;
      p[2] = made.blue;
    }
  }

  // The mean brightness as a grey level, the same in all threads; `sums` has THREADS places.
  __device__ float mean_brightness(const float* image, Levels levels, float* sums) const {
    float sum = 0.0f;
    for (int i = threadIdx.x; i < height * width; i += THREADS)
      sum += brightness(Colour{image[CHANNELS * i], image[CHANNELS * i + 1], image[CHANNELS * i + 2]});
    sums[threadIdx.x] = sum;
    __syncthreads();
    for (int half = THREADS / 2; half > 0; half /= 2) {
      if (static_cast<int>(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
      __syncthreads();
    }
    return at_levels(sums[0] / static_cast<float>(height * width), levels);
  }

  // The colour jitter. All of its steps work on a thread's own pixels; contrast alone looks at the others.
  __device__ void jitter(float* image, const float* row, Levels levels, float* sums) const {
    for (int k = 0; k < JITTER_STEPS; ++k) {
      const int step = static_cast<int>(row[ROW_JITTER_ORDER + k]);
      const float amount = row[ROW_JITTER + step];
      if (step == JITTER_HUE) {
        recolour(image, levels, [=](Colour c) { return jittered<JITTER_HUE>(c, amount, 0.0f); });
      } else if (step == JITTER_SATURATION) {
        recolour(image, levels, [=](Colour c) { return jittered<JITTER_SATURATION>(c, amount, 0.0f); });
      } else if (step == JITTER_BRIGHTNESS) {
        recolour(image, levels, [=](Colour c) { return jittered<JITTER_BRIGHTNESS>(c, amount, 0.0f); });
      } else {
        const float mean = mean_brightness(image, levels, sums);
        recolour(image, levels, [=](Colour c) { return jittered<JITTER_CONTRAST>(c, amount, mean); });
      }
      levels = Levels();
    }
  }

  // Grey, solarise and colour jitter, in place; what the levels are afterwards.
  __device__ Levels colour(int operation, float* image, const float* row, Levels levels, float* sums) const {
    if (operation == GREY) {
      recolour(image, Levels(), [](Colour c) { return Colour{brightness(c), brightness(c), brightness(c)}; });
      return levels;
    }
    if (operation == SOLARISE) {
      const float at = row[ROW_THRESHOLD];
      recolour(image, levels, [=](Colour c) {
        return Colour{solarised(c.red, at), solarised(c.green, at), solarised(c.blue, at)};
      });
    } else {
      jitter(image, row, levels, sums);
    }
    return Levels();
  }

  // The strips of image `image` to where `places` shows them among `batch` permuted pictures.
  template <class T>
  __device__ void write_permuted(const float* from, T* permuted, Levels levels, const int64_t* places, int patches,
                                 int64_t batch) const {
    const int length = line() / patches;
    for (int i = threadIdx.x % WARP; i < line(); i += WARP) {
      const int strip = i / length;
      const int64_t place = places[strip];
      if (place < 0 || place >= batch * patches) continue;
      T* const column = permuted + place / patches * size() + i + (static_cast<int>(place % patches) - strip) * length;
      for (int y = threadIdx.x / WARP; y < height; y += WARPS)
        store(at_levels(from[y * line() + i], levels), column + y * line());
    }
  }
};

template <class T>
__global__ void __launch_bounds__(THREADS, 2)
    apply_kernel(const uint8_t* images, const float* rows, T* views, int64_t batch, Picture picture, Output output) {
  extern __shared__ float buffers[];
  __shared__ float row[ROW_SIZE];
  __shared__ Prepared prepared;
  __shared__ float sums[THREADS];
  const int64_t image = blockIdx.x, item = int64_t(blockIdx.y) * batch + image;
  const int n = picture.size();
  float *from = buffers, *to = buffers + n;
  for (int i = threadIdx.x; i < ROW_SIZE; i += THREADS) row[i] = rows[item * ROW_SIZE + i];
  for (int i = threadIdx.x; i < n; i += THREADS) from[i] = images[image * n + i];
  __syncthreads();
  if (threadIdx.x == 0) prepare(row, prepared);
  __syncthreads();
  const int count = static_cast<int>(row[ROW_COUNT]);
  Levels levels;
  for (int i = 0; i < count; ++i) {
    const int operation = static_cast<int>(row[ROW_ORDER + i]);
    if (operation == CONTRAST) {
      levels = contrasted(levels, row[ROW_CONTRAST]);
      continue;
    }
    if (is_geometric(operation)) {
      const int first = i;
      while (i + 1 < count && is_geometric(static_cast<int>(row[ROW_ORDER + i + 1]))) ++i;
      picture.warp(from, to, row, prepared, first, i);
    } else if (operation == SHARPEN) {
      picture.sharpen(from, to, Sharpening(levels, row[ROW_SHARPEN], row[ROW_SHARPEN + 1]));
      levels = Levels();
    } else if (operation == BLUR) {
      picture.blur(from, to, prepared);
      continue;
    } else {
      levels = picture.colour(operation, from, row, levels, sums);
      __syncthreads();
      continue;
    }
    __syncthreads();
    float* const written = to;
    to = from;
    from = written;
  }
  levels = normalising(levels);
  for (int i = threadIdx.x; i < n; i += THREADS) store(at_levels(from[i], levels), views + item * n + i);
  if (output.places == nullptr || blockIdx.y > 0) return;
  T* const permuted = views + int64_t(gridDim.y) * batch * n;
  picture.write_permuted(from, permuted, levels, output.places + image * output.patches, output.patches, batch);
}

template <class T>
void launch(const uint8_t* images, const float* rows, T* views, ViewShape shape, Output output, cudaStream_t order) {
  const Picture picture{shape.height, shape.width};
  const size_t bytes = 2 * sizeof(float) * CHANNELS * size_t(shape.height) * shape.width;
  check(cudaFuncSetAttribute(apply_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
        "shared memory");
  const dim3 grid(static_cast<unsigned>(shape.batch), static_cast<unsigned>(shape.views));
  apply_kernel<T><<<grid, THREADS, bytes, order>>>(images, rows, views, shape.batch, picture, output);
  check(cudaGetLastError(), "augmentation");
}

}  // namespace

void draw_parameters_cuda(const int64_t* index, float* rows, int64_t views, int64_t batch, uint64_t seed,
                          uint32_t epoch, uint32_t first_stream, const Preset& preset, void* stream) {
  if (views * batch == 0) return;
  const dim3 grid(static_cast<unsigned>(batch), static_cast<unsigned>(views));
  const auto order = static_cast<cudaStream_t>(stream);
  draw_kernel<<<grid, 64, 0, order>>>(index, rows, batch, seed, epoch, first_stream, preset);
  check(cudaGetLastError(), "drawing of parameters");
}

void apply_parameters_cuda(const uint8_t* images, const float* rows, void* views, ViewShape shape, Output output,
                           void* stream) {
  if (shape.views * shape.batch == 0) return;
  const auto order = static_cast<cudaStream_t>(stream);
  if (output.bfloat16)
    launch(images, rows, static_cast<uint16_t*>(views), shape, output, order);
  else
    launch(images, rows, static_cast<float*>(views), shape, output, order);
}

}  // namespace rcmstr
