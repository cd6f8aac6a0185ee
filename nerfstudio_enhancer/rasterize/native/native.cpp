// Threads, memory, choice of the instruction set, and the exported functions.

#include "internal.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace {

// ---------------------------------------------------------------------------------------------------- threads

// Workers sleep between calls. One job at a time: a second caller meanwhile runs its job alone, on its own thread.
class Pool {
 public:
  void run(int threads, int64_t tasks, NseTask function, void* argument) {
    std::unique_lock<std::mutex> busy(busy_, std::try_to_lock);
    if (!busy.owns_lock()) {
      for (int64_t t = 0; t < tasks; ++t) function(argument, t);
      return;
    }
    const int helpers = static_cast<int>(std::min<int64_t>(threads, tasks)) - 1;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(workers_.size()) < helpers) {
        const int id = static_cast<int>(workers_.size());
        workers_.emplace_back([this, id, seen = job_] { work(id, seen); });
        workers_.back().detach();
      }
      function_ = function, argument_ = argument, tasks_ = tasks;
      next_.store(0, std::memory_order_relaxed);
      helpers_ = helpers, running_ = helpers;
      ++job_;
    }
    wake_.notify_all();
    drain();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
  }

 private:
  void drain() {
    for (int64_t t; (t = next_.fetch_add(1, std::memory_order_relaxed)) < tasks_;) function_(argument_, t);
  }

  void work(int id, uint64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return job_ != seen; });
      seen = job_;
      if (id >= helpers_) continue;
      lock.unlock();
      drain();
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex busy_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  NseTask function_ = nullptr;
  void* argument_ = nullptr;
  int64_t tasks_ = 0;
  std::atomic<int64_t> next_{0};
  int helpers_ = 0, running_ = 0;
  uint64_t job_ = 0;
};

// The workers do not survive a fork (PyTorch's data loaders): a child process gets a new pool, the old one is left.
Pool& pool() {
  static std::mutex mutex;
  static Pool* current = nullptr;
#if defined(__unix__) || defined(__APPLE__)
  static pid_t owner = 0;
  std::lock_guard<std::mutex> lock(mutex);
  if (!current || owner != getpid()) current = new Pool(), owner = getpid();
#else
  std::lock_guard<std::mutex> lock(mutex);
  if (!current) current = new Pool();
#endif
  return *current;
}

// ----------------------------------------------------------------------------------------------------- frames

std::mutex frames_mutex;
Frame* free_frames = nullptr;

template <class F>
void for_each_buffer(Frame* frame, F body) {
  for (Buffer* b : {&frame->order, &frame->rank, &frame->records, &frame->slot_base, &frame->tile_base, &frame->isect_rank,
                    &frame->isect_slot, &frame->isect_mask, &frame->transmittance, &frame->last, &frame->slot_used})
    body(b);
  for (Buffer& b : frame->scratch) body(&b);
}

constexpr size_t kKeptCapacity = size_t(64) << 20;

// Half of the machine's memory. An operating system that promises more than it has would kill the process instead.
size_t largest_buffer() {
#if defined(_SC_PHYS_PAGES)
  static const long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
  if (pages > 0 && page > 0) return static_cast<size_t>(pages) / 2 * static_cast<size_t>(page);
#endif
  return SIZE_MAX / 2;
}

// The C library takes blocks from 32 MB on afresh from the system each time: with small pages, touching them costs more
// than computing what they hold.
void fault_in_large_pages(void* memory, size_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096;
  if (bytes < size_t(32) << 20) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

// ------------------------------------------------------------------------------------------------- instruction set

const KernelTable* kernels = nullptr;

const KernelTable* find_kernels(const char* name) {
#if defined(NSE_X86_VARIANTS)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (avx512 && (!name || !strcmp(name, "avx512"))) return &nse_kernels_avx512;
  if (avx2 && (!name || !strcmp(name, "avx2"))) return &nse_kernels_avx2;
#endif
  if (!name || !strcmp(name, "baseline")) return &nse_kernels_baseline;
  return nullptr;
}

const KernelTable& chosen() {
  if (!kernels) kernels = find_kernels(nullptr);
  return *kernels;
}

}  // namespace

extern "C" __attribute__((visibility("hidden"))) void nse_parallel(int threads, int64_t tasks, NseTask function, void* argument) {
  if (threads <= 1 || tasks <= 1) {
    for (int64_t t = 0; t < tasks; ++t) function(argument, t);
    return;
  }
  pool().run(threads, tasks, function, argument);
}

extern "C" __attribute__((visibility("hidden"))) void* nse_reserve(Buffer* buffer, size_t bytes) {
#if defined(NSE_EXACT_BUFFERS)  // sanitizer builds: nothing is recycled, and the first byte behind the buffer is forbidden
  std::free(buffer->data);
  buffer->capacity = posix_memalign(&buffer->data, 64, bytes) ? 0 : bytes;
  return buffer->capacity ? buffer->data : nullptr;
#endif
  // A single huge image must not hold its memory for ever.
  const bool wasteful = buffer->capacity > kKeptCapacity && buffer->capacity / 8 > bytes;
  if (buffer->capacity >= bytes && !wasteful) return buffer->data;
  std::free(buffer->data);
  buffer->data = nullptr, buffer->capacity = 0;
  if (bytes > largest_buffer()) return nullptr;
  constexpr size_t kHuge = size_t(2) << 20;
  size_t capacity = (bytes + bytes / 4 + 4095) / 4096 * 4096;
  const size_t alignment = capacity >= kHuge ? kHuge : 64;
  if (alignment == kHuge) capacity = (capacity + kHuge - 1) / kHuge * kHuge;
  if (posix_memalign(&buffer->data, alignment, capacity)) {
    buffer->data = nullptr;
    return nullptr;
  }
#if defined(MADV_HUGEPAGE)
  if (alignment == kHuge) madvise(buffer->data, capacity, MADV_HUGEPAGE);
#endif
  buffer->capacity = capacity;
  return buffer->data;
}

extern "C" __attribute__((visibility("hidden"))) double nse_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

NSE_EXPORT int nse_abi_version() { return NSE_ABI_VERSION; }
NSE_EXPORT int64_t nse_struct_size(int which) {
  const int64_t sizes[] = {sizeof(NseProjectArgs), sizeof(NseRasterArgs), sizeof(NseSsimArgs), sizeof(NsePatchArgs),
                           sizeof(NsePatchSource)};
  return sizes[which];
}
NSE_EXPORT const char* nse_isa() { return chosen().name; }
// Forces "avx512", "avx2" or "baseline"; null = the best one. Returns 0 if this machine or build lacks it.
NSE_EXPORT int nse_select_isa(const char* name) {
  const KernelTable* found = find_kernels(name);
  if (found) kernels = found;
  return found != nullptr;
}

NSE_EXPORT int nse_project_forward(const NseProjectArgs* a) { return chosen().project_forward(a); }
NSE_EXPORT int nse_project_backward(const NseProjectArgs* a) {
  if (a->v_colors) fault_in_large_pages(a->v_colors, sizeof(float) * a->color_stride * a->gaussians * (a->colors_per_camera ? a->cameras : 1));
  return chosen().project_backward(a);
}
NSE_EXPORT int nse_raster_forward(const NseRasterArgs* a) { return chosen().raster_forward(a); }
NSE_EXPORT int nse_raster_backward(const NseRasterArgs* a) { return chosen().raster_backward(a); }
NSE_EXPORT int nse_ssim_forward(const NseSsimArgs* a) { return chosen().ssim_forward(a); }
NSE_EXPORT int nse_ssim_backward(const NseSsimArgs* a) { return chosen().ssim_backward(a); }
NSE_EXPORT int nse_patch_cost(const NsePatchArgs* a) { return chosen().patch_cost(a); }
// For the benchmark: seconds of one vector multiply-add, and its lanes.
NSE_EXPORT double nse_vector_seconds() { return chosen().vector_seconds(); }
NSE_EXPORT int nse_vector_width() { return chosen().vector_width; }

// Frames are recycled: their memory stays mapped, which saves the page faults of a fresh allocation in every step.
NSE_EXPORT void* nse_frame_acquire() {
  std::lock_guard<std::mutex> lock(frames_mutex);
  Frame* frame = free_frames;
  if (frame)
    free_frames = frame->next;
  else
    frame = new (std::nothrow) Frame();
  return frame;
}

NSE_EXPORT void nse_frame_release(void* pointer) {
  if (!pointer) return;
  std::lock_guard<std::mutex> lock(frames_mutex);
  Frame* frame = static_cast<Frame*>(pointer);
  int kept = 0;
  for (Frame* f = free_frames; f; f = f->next) ++kept;
  if (kept >= 2) {  // one for training, one for a viewer
    for_each_buffer(frame, [](Buffer* b) { std::free(b->data); });
    delete frame;
    return;
  }
  frame->next = free_frames;
  free_frames = frame;
}

NSE_EXPORT int64_t nse_frame_intersections(const void* frame) { return static_cast<const Frame*>(frame)->intersections; }
// For the benchmark, after a forward pass: blended pairs of pixel and Gaussian, and the lanes of the blocks they are in.
NSE_EXPORT void nse_frame_blended(const void* frame, int64_t cameras, int64_t* out) {
  chosen().count_blended(static_cast<const Frame*>(frame), cameras, out, out + 1);
}
NSE_EXPORT int64_t nse_frame_bytes(void* pointer) {
  int64_t bytes = 0;
  for_each_buffer(static_cast<Frame*>(pointer), [&](Buffer* b) { bytes += static_cast<int64_t>(b->capacity); });
  return bytes;
}
NSE_EXPORT void nse_frame_seconds(const void* frame, double* out) {
  std::memcpy(out, static_cast<const Frame*>(frame)->seconds, sizeof(double) * 4);
}
// The sorted intersections in gsplat's form: how many tiles each Gaussian touches [C, N], keys (camera, tile, depth) and
// ids into [C * N] by intersection, and the first intersection of each tile.
NSE_EXPORT void nse_frame_lists(const void* pointer, int64_t cameras, int64_t gaussians, int32_t threads, const float* depths,
                                int32_t* tiles_per_gauss, int64_t* isect_ids, int32_t* flatten_ids, int32_t* tile_offsets) {
  const Frame& f = *static_cast<const Frame*>(pointer);
  const auto order = static_cast<const uint32_t*>(f.order.data), isect_rank = static_cast<const uint32_t*>(f.isect_rank.data);
  const auto slot_base = static_cast<const uint32_t*>(f.slot_base.data), tile_base = static_cast<const uint32_t*>(f.tile_base.data);
  const auto rank = static_cast<const int32_t*>(f.rank.data);
  const int64_t tiles = f.tiles_x * f.tiles_y;
  int bits = 0;
  while (tiles >> bits) ++bits;
  for (int64_t i = 0; i < cameras * gaussians; ++i)
    tiles_per_gauss[i] = rank[i] < 0 ? 0 : static_cast<int32_t>(slot_base[rank[i] + 1] - slot_base[rank[i]]);
  auto body = [&](int64_t tile) {
    tile_offsets[tile] = static_cast<int32_t>(tile_base[tile]);
    const int64_t high = (tile / tiles << (32 + bits)) | (tile % tiles << 32);
    for (uint32_t i = tile_base[tile]; i < tile_base[tile + 1]; ++i) {
      const uint32_t gaussian = order[isect_rank[i]];
      uint32_t depth;
      std::memcpy(&depth, &depths[gaussian], 4);
      flatten_ids[i] = static_cast<int32_t>(gaussian);
      isect_ids[i] = high | depth;
    }
  };
  nse_parallel(threads, cameras * tiles, [](void* b, int64_t t) { (*static_cast<decltype(body)*>(b))(t); }, &body);
}
