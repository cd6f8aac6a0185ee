// Plain C interface of the CPU rasteriser. The structures are mirrored field by field in ../native_library.py,
// which checks their sizes when it loads the library. No torch headers: one build serves every torch version.
#pragma once

#include <stdint.h>

#define NSE_ABI_VERSION 2

#if defined(_WIN32)
#define NSE_EXPORT extern "C" __declspec(dllexport)
#else
#define NSE_EXPORT extern "C" __attribute__((visibility("default")))
#endif

// Bits of the return value: which input holds NaN or infinity; or which limit is broken.
enum {
  NSE_BAD_MEANS = 1,
  NSE_BAD_QUATS = 2,
  NSE_BAD_SCALES = 4,
  NSE_BAD_OPACITIES = 8,
  NSE_BAD_COLORS = 16,
  NSE_BAD_EXTRA = 32,
  NSE_BAD_CAMERA = 64,
  NSE_OUT_OF_MEMORY = 1 << 16,
  NSE_TOO_MANY_INTERSECTIONS = 1 << 17,
};

// 3D Gaussians -> 2D Gaussians with their blended channels ("features": colours, extra channels, depth).
typedef struct NseProjectArgs {
  int64_t cameras, gaussians;
  int32_t width, height;
  int32_t sh_degree;          // -1: `colors` are the channels themselves
  int32_t color_stride;       // floats of `colors` per Gaussian: 3 K for SH coefficients, else the number of channels
  int32_t color_channels;     // channels that `colors` gives to the features: 3 for SH, 0 if colours are not rendered
  int32_t extra_channels;
  int32_t with_depth;         // 1: z-depth is the last feature
  int32_t antialiased;
  int32_t colors_per_camera;  // 1: `colors` has a leading camera axis
  int32_t threads;
  float near_plane, far_plane, radius_clip, eps2d;
  const float *means, *quats, *scales, *opacities, *colors, *extra, *viewmats, *camera_centres, *intrinsics;
  // outputs of the forward pass [C, N, ...]
  int32_t* radii;
  float *means2d, *depths, *conics, *compensations, *opacities2d, *features;
  // gradients of the outputs; null = zero
  const float *v_means2d, *v_depths, *v_conics, *v_opacities2d, *v_features;
  // gradients of the inputs; null = not wanted (means, quats, scales and opacities are always written)
  float *v_means, *v_quats, *v_scales, *v_opacities, *v_colors, *v_extra, *v_viewmats, *v_camera_centres;
} NseProjectArgs;

// 2D Gaussians -> pixels.
typedef struct NseRasterArgs {
  int64_t cameras, gaussians;
  int32_t width, height;
  int32_t channels;
  int32_t normalise_last;  // 1: divide the last channel by the accumulated opacity (expected depth)
  int32_t threads;
  int32_t reserved;
  void* frame;             // from nse_frame_acquire: holds what the backward pass needs
  const float *means2d, *conics, *opacities, *features, *backgrounds, *depths;
  const int32_t* radii;
  float *render, *alpha;   // [C, H, W, F], [C, H, W, 1]
  // backward
  const float *v_render, *v_alpha;  // null = zero
  float *v_means2d, *v_means2d_abs, *v_conics, *v_opacities, *v_features, *v_backgrounds;  // abs, backgrounds: null = not wanted
} NseRasterArgs;

// Mean SSIM over [B, C, H, W] with an 11-tap Gaussian window, "valid" borders. Strides in floats.
typedef struct NseSsimArgs {
  int64_t batch, channels, height, width;
  int64_t pred_strides[4], target_strides[4], grad_strides[4];
  int32_t threads;
  int32_t reserved;
  const float *pred, *target;
  double* mean;        // out, scalar
  float* derivatives;  // [3, B, C, H-10, W-10], written by the forward pass if not null, read by the backward pass
  float scale;         // backward: gradient of the mean
  float* grad;         // backward: gradient of pred
} NseSsimArgs;

// One picture that patches are compared with.
typedef struct NsePatchSource {
  const int32_t* pairs;  // [height, width + 1]: grey, 0 to 65535, of the pixel (low half) and of the one below; repeated at
                         // the borders. One look reads two pixels.
  const float* base;   // [3, pixels of the view]: homogeneous place in this picture (sides at -1 and 1) at infinity
  const float* moves;  // [3, samples]: what the samples' offsets add to the place
  int64_t height, width;
  float epipole[3];    // what an inverse depth of 1 adds to the place
  float reserved;
} NsePatchSource;

// Matching cost of one plane per pixel between a view's patches and its sources (stereo/patches.py).
typedef struct NsePatchArgs {
  int64_t pixels;               // of the view, 16 or more
  int32_t sources, samples;     // of a patch; the middle one is the pixel itself
  int32_t threads;
  float floor;                  // variance that tells nothing
  const NsePatchSource* source; // [sources]
  const float *weights, *view;  // [samples, pixels]: share of each sample, the view's grey there
  const float *mean, *variance; // [pixels]: of the view's patches
  const float* offsets;         // [2, samples] along u and v
  const float* planes;          // [3, pixels]: inverse depth and its change along u and v
  float* cost;                  // [pixels], out: mean over the better half of the sources, up to two; 0.5 where none sees it
} NsePatchArgs;
