// Shared by native.cpp (threads, memory, dispatch) and kernels.cpp (compiled once per instruction set).
// kernels.cpp must not use templates or inline functions of the C++ library: the linker would be free to keep the
// AVX-512 copy for every machine.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "interface.h"

constexpr int kTile = 16;              // tile side in pixels, as gsplat's default
constexpr int kTilePixels = kTile * kTile;
constexpr int kBlock = 4;              // a tile is 4 x 4 blocks of 4 x 4 pixels; one block is 16 vector lanes
constexpr int kRecordHeader = 8;       // floats before the features in a record, see build_records
constexpr float kLogAlphaMin = -7.994353436858858f;  // log2(1/255), gsplat's least alpha
constexpr float kAlphaMax = 0.999f;
constexpr float kTransmittanceStop = 1e-4f;
constexpr float kLog2e = 1.4426950408889634f;

struct Buffer {
  void* data;
  size_t capacity;
};

// What the forward pass of the rasteriser leaves behind for the backward pass.
struct Frame {
  Buffer order;      // uint32 [visible]: index in [C * N]
  Buffer rank;       // int32 [C * N]: position in `order` or -1 if not drawn
  Buffer records;    // float [visible, record_stride]
  Buffer slot_base;  // uint32 [visible + 1]: first gradient slot of each visible Gaussian
  Buffer tile_base;  // uint32 [C * tiles + 1]
  Buffer isect_rank; // uint32 [intersections], sorted by (tile, depth)
  Buffer isect_slot; // uint32 [intersections]
  Buffer isect_mask; // uint16 [intersections]: blocks of the tile that really receive light
  Buffer transmittance; // float [C * tiles, 256], block by block
  Buffer last;       // int32 [C * tiles, 256]: last contributing intersection of the tile, -1 = none
  Buffer slot_used;  // uint8 [intersections]
  Buffer scratch[8];
  int64_t visible, intersections, width, height, tiles_x, tiles_y;
  int32_t record_stride, slot_stride;
  double seconds[8];  // binning, raster forward, raster backward, reduction
  Frame* next;
};

enum { kTimeBin = 0, kTimeForward = 1, kTimeBackward = 2, kTimeReduce = 3 };

typedef void (*NseTask)(void* argument, int64_t task);

// Runs task 0..tasks-1 on up to `threads` threads. Which thread runs which task is not determined.
extern "C" void nse_parallel(int threads, int64_t tasks, NseTask function, void* argument);
// At least `bytes` bytes, aligned to 64; the old content may be lost. Null when memory is short.
extern "C" void* nse_reserve(Buffer* buffer, size_t bytes);
extern "C" double nse_now();

struct KernelTable {
  const char* name;
  int (*project_forward)(const NseProjectArgs*);
  int (*project_backward)(const NseProjectArgs*);
  int (*raster_forward)(const NseRasterArgs*);
  int (*raster_backward)(const NseRasterArgs*);
  int (*ssim_forward)(const NseSsimArgs*);
  int (*ssim_backward)(const NseSsimArgs*);
  int (*patch_cost)(const NsePatchArgs*);
  void (*count_blended)(const Frame*, int64_t cameras, int64_t* blended, int64_t* lanes);
  double (*vector_seconds)();
  int vector_width;
};

extern "C" const KernelTable nse_kernels_baseline;
#if defined(NSE_X86_VARIANTS)
extern "C" const KernelTable nse_kernels_avx2;
extern "C" const KernelTable nse_kernels_avx512;
#endif
