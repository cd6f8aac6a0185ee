// The numerical kernels. This file is compiled once per instruction set (see setup.py); NSE_TABLE names the variant.
//
// Conventions are those of gsplat 1.4: OpenCV cameras (world-to-camera matrices, z forward), quaternions wxyz, pixel
// centres at +0.5, alpha clamped to 0.999, contributions below 1/255 skipped, a pixel closed before its transmittance
// falls to 1e-4.
//
// Nothing here depends on the number of threads: work is cut into tasks of fixed size, each task writes its own
// memory, and sums over tasks are taken in a fixed order.

#include "internal.h"
#include "simd.h"

#include <float.h>
#include <stdlib.h>

namespace {

constexpr int kGaussiansPerTask = 1024;

template <class F>
void parallel(int threads, int64_t tasks, F& body) {
  nse_parallel(threads, tasks, [](void* f, int64_t task) { (*static_cast<F*>(f))(task); }, &body);
}

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ------------------------------------------------------------------------------------------------ projection

struct Camera {
  float rotation[9], translation[3], centre[3];
  float fx, fy, cx, cy;
  float limit_x_pos, limit_x_neg, limit_y_pos, limit_y_neg;  // gsplat clamps x/z in the Jacobian to 1.15 x the view
};

Camera read_camera(const NseProjectArgs& a, int64_t c) {
  Camera cam;
  const float* v = a.viewmats + 16 * c;
  const float* k = a.intrinsics + 9 * c;
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 3; ++j) cam.rotation[3 * i + j] = v[4 * i + j];
    cam.translation[i] = v[4 * i + 3];
    cam.centre[i] = a.camera_centres[3 * c + i];
  }
  cam.fx = k[0], cam.fy = k[4], cam.cx = k[2], cam.cy = k[5];
  const float margin_x = 0.3f * 0.5f * a.width / cam.fx, margin_y = 0.3f * 0.5f * a.height / cam.fy;
  cam.limit_x_pos = (a.width - cam.cx) / cam.fx + margin_x;
  cam.limit_x_neg = cam.cx / cam.fx + margin_x;
  cam.limit_y_pos = (a.height - cam.cy) / cam.fy + margin_y;
  cam.limit_y_neg = cam.cy / cam.fy + margin_y;
  return cam;
}

// `count` rows of `width` floats -> one vector per column; the last row fills unused lanes.
NSE_INLINE void load_columns(const float* rows, int width, int count, vf* columns) {
  alignas(64) float buffer[VW];
  for (int d = 0; d < width; ++d) {
    for (int l = 0; l < VW; ++l) buffer[l] = rows[(l < count ? l : count - 1) * width + d];
    columns[d] = vload(buffer);
  }
}

NSE_INLINE void store_columns(float* rows, int width, int count, const vf* columns) {
  alignas(64) float buffer[VW];
  for (int d = 0; d < width; ++d) {
    vstore(buffer, columns[d]);
    for (int l = 0; l < count; ++l) rows[l * width + d] = buffer[l];
  }
}

NSE_INLINE vm first_lanes(int count) {
  alignas(64) float lane[VW];
  for (int l = 0; l < VW; ++l) lane[l] = (float)l;
  return vgt(vset((float)count), vload(lane));
}

NSE_INLINE vm finite(vf a) { return vge(vset(FLT_MAX), vabs(a)); }
NSE_INLINE bool all_finite(const vf* a, int n) {
  vm bad = vgt(vset(0.0f), vset(1.0f));
  const vm all = vge(vset(0.0f), vset(0.0f));
  for (int i = 0; i < n; ++i) bad = vor(bad, vandnot(all, finite(a[i])));
  return !vany(bad);
}

// Rotation matrix times scale. rotation, m: row-major 3 x 3. `q` becomes the unit quaternion.
NSE_INLINE vf rotation_scale(vf* q, const vf* s, vf* rotation, vf* m) {
  const vf inv_norm = vset(1.0f) / vsqrt(vfma(q[0], q[0], vfma(q[1], q[1], vfma(q[2], q[2], q[3] * q[3]))));
  for (int i = 0; i < 4; ++i) q[i] = q[i] * inv_norm;
  const vf w = q[0], x = q[1], y = q[2], z = q[3], one = vset(1.0f), two = vset(2.0f);
  rotation[0] = one - two * (y * y + z * z);
  rotation[1] = two * (x * y - w * z);
  rotation[2] = two * (x * z + w * y);
  rotation[3] = two * (x * y + w * z);
  rotation[4] = one - two * (x * x + z * z);
  rotation[5] = two * (y * z - w * x);
  rotation[6] = two * (x * z - w * y);
  rotation[7] = two * (y * z + w * x);
  rotation[8] = one - two * (x * x + y * y);
  for (int i = 0; i < 9; ++i) m[i] = rotation[i] * s[i % 3];
  return inv_norm;
}

struct Projected {
  vf camera_point[3], rz, tan_x, tan_y;  // tan_*: clamped x/z, y/z
  vm inside_x, inside_y;                 // where they are not clamped
  vf jr0[3], jr1[3];                     // Jacobian times rotation
  vf t0[3], t1[3];                       // ... times M: covariance = T T^t
  vf conic[3], compensation, inv_det, radius, mean2d[2];
  vm visible;
};

NSE_INLINE vf dot3(const vf* a, const vf* b) { return vfma(a[0], b[0], vfma(a[1], b[1], a[2] * b[2])); }

NSE_INLINE void project(const NseProjectArgs& a, const Camera& cam, const vf* mean, const vf* m, Projected& p) {
  const float* r = cam.rotation;
  for (int i = 0; i < 3; ++i)
    p.camera_point[i] = vfma(vset(r[3 * i]), mean[0], vfma(vset(r[3 * i + 1]), mean[1], vfma(vset(r[3 * i + 2]), mean[2], vset(cam.translation[i]))));
  const vf z = p.camera_point[2];
  vm visible = vand(vand(vge(z, vset(a.near_plane)), vge(vset(a.far_plane), z)), vgt(z, vset(0.0f)));
  p.rz = vset(1.0f) / z;
  const vf xz = p.camera_point[0] * p.rz, yz = p.camera_point[1] * p.rz;
  p.inside_x = vand(vge(vset(cam.limit_x_pos), xz), vge(xz, vset(-cam.limit_x_neg)));
  p.inside_y = vand(vge(vset(cam.limit_y_pos), yz), vge(yz, vset(-cam.limit_y_neg)));
  p.tan_x = vmin(vset(cam.limit_x_pos), vmax(vset(-cam.limit_x_neg), xz));
  p.tan_y = vmin(vset(cam.limit_y_pos), vmax(vset(-cam.limit_y_neg), yz));
  const vf j00 = vset(cam.fx) * p.rz, j11 = vset(cam.fy) * p.rz;
  const vf j02 = vset(0.0f) - j00 * p.tan_x, j12 = vset(0.0f) - j11 * p.tan_y;
  for (int k = 0; k < 3; ++k) {
    p.jr0[k] = vfma(j00, vset(r[k]), j02 * vset(r[6 + k]));
    p.jr1[k] = vfma(j11, vset(r[3 + k]), j12 * vset(r[6 + k]));
  }
  for (int k = 0; k < 3; ++k) {
    p.t0[k] = vfma(p.jr0[0], m[k], vfma(p.jr0[1], m[3 + k], p.jr0[2] * m[6 + k]));
    p.t1[k] = vfma(p.jr1[0], m[k], vfma(p.jr1[1], m[3 + k], p.jr1[2] * m[6 + k]));
  }
  const vf eps = vset(a.eps2d);
  const vf cxx0 = dot3(p.t0, p.t0), cyy0 = dot3(p.t1, p.t1), cxy = dot3(p.t0, p.t1);
  // Lagrange's identity: det(T T^t) = |t0 x t1|^2, free of cancellation and never negative.
  const vf u0 = p.t0[1] * p.t1[2] - p.t0[2] * p.t1[1];
  const vf u1 = p.t0[2] * p.t1[0] - p.t0[0] * p.t1[2];
  const vf u2 = p.t0[0] * p.t1[1] - p.t0[1] * p.t1[0];
  const vf det0 = vfma(u0, u0, vfma(u1, u1, u2 * u2));
  const vf det = vfma(eps, cxx0 + cyy0 + eps, det0);
  const vf cxx = cxx0 + eps, cyy = cyy0 + eps;
  p.inv_det = vset(1.0f) / det;
  p.conic[0] = cyy * p.inv_det;
  p.conic[1] = vset(0.0f) - cxy * p.inv_det;
  p.conic[2] = cxx * p.inv_det;
  p.compensation = vsqrt(det0 * p.inv_det);
  const vf half_sum = vset(0.5f) * (cxx + cyy), half_difference = vset(0.5f) * (cxx - cyy);
  const vf v1 = half_sum + vsqrt(vmax(vset(0.01f), vfma(half_difference, half_difference, cxy * cxy)));
  p.radius = vmin(vceil(vset(3.0f) * vsqrt(v1)), vset(1e9f));
  p.mean2d[0] = vfma(vset(cam.fx), xz, vset(cam.cx));
  p.mean2d[1] = vfma(vset(cam.fy), yz, vset(cam.cy));
  visible = vand(visible, vgt(p.radius, vset(a.radius_clip)));
  visible = vand(visible, vand(vgt(p.mean2d[0] + p.radius, vset(0.0f)), vgt(vset((float)a.width), p.mean2d[0] - p.radius)));
  visible = vand(visible, vand(vgt(p.mean2d[1] + p.radius, vset(0.0f)), vgt(vset((float)a.height), p.mean2d[1] - p.radius)));
  // Overflow and zero quaternions give infinity or NaN: such a Gaussian is not drawn.
  visible = vand(visible, vand(vgt(det, vset(0.0f)), vand(finite(det), finite(v1))));
  p.visible = vand(visible, vand(finite(p.mean2d[0]), finite(p.mean2d[1])));
}

// Spherical harmonics up to degree 3 at unit directions (Sloan, JCGT 2013; signs as gsplat).
constexpr float kSh0 = 0.2820947917738781f, kSh1 = 0.48860251190292f, kSh2a = 1.092548430592079f, kSh2b = 0.5462742152960395f;
constexpr float kSh6a = 0.9461746957575601f, kSh6b = 0.3153915652525201f, kSh3a = 0.5900435899266435f, kSh3b = 1.445305721320277f;
constexpr float kSh3c = 2.285228997322329f, kSh3d = 0.4570457994644658f, kSh3e = 1.865881662950577f, kSh3f = 1.119528997770346f;

NSE_INLINE void sh_basis(int degree, vf x, vf y, vf z, vf* b) {
  b[0] = vset(kSh0);
  if (degree < 1) return;
  b[1] = vset(-kSh1) * y, b[2] = vset(kSh1) * z, b[3] = vset(-kSh1) * x;
  if (degree < 2) return;
  const vf xy = x * y, z2 = z * z, x2_y2 = x * x - y * y;
  b[4] = vset(kSh2a) * xy, b[5] = vset(-kSh2a) * y * z, b[6] = vset(kSh6a) * z2 - vset(kSh6b);
  b[7] = vset(-kSh2a) * x * z, b[8] = vset(kSh2b) * x2_y2;
  if (degree < 3) return;
  const vf c = vset(kSh3d) - vset(kSh3c) * z2;
  b[9] = vset(-kSh3a) * y * (vset(2.0f) * x * x + x2_y2);
  b[10] = vset(2.0f * kSh3b) * xy * z;
  b[11] = c * y, b[12] = z * (vset(kSh3e) * z2 - vset(kSh3f)), b[13] = c * x;
  b[14] = vset(kSh3b) * z * x2_y2;
  b[15] = vset(-kSh3a) * x * (x2_y2 - vset(2.0f) * y * y);
}

NSE_INLINE void sh_basis_vjp(int degree, vf x, vf y, vf z, const vf* v, vf* out) {
  vf vx = vset(0.0f), vy = vx, vz = vx;
  if (degree >= 1) vx = vx - vset(kSh1) * v[3], vy = vy - vset(kSh1) * v[1], vz = vz + vset(kSh1) * v[2];
  if (degree >= 2) {
    vx = vx + vset(kSh2a) * (y * v[4] - z * v[7] + x * v[8]);
    vy = vy + vset(kSh2a) * (x * v[4] - z * v[5] - y * v[8]);
    vz = vz + vset(2.0f * kSh6a) * z * v[6] - vset(kSh2a) * (y * v[5] + x * v[7]);
  }
  if (degree >= 3) {
    const vf z2 = z * z, xy = x * y, x2_y2 = x * x - y * y, c = vset(kSh3d) - vset(kSh3c) * z2;
    vx = vx - vset(kSh3a) * (vset(6.0f) * xy * v[9] + vset(3.0f) * x2_y2 * v[15]) + vset(2.0f * kSh3b) * z * (y * v[10] + x * v[14]) + c * v[13];
    vy = vy - vset(kSh3a) * (vset(3.0f) * x2_y2 * v[9] - vset(6.0f) * xy * v[15]) + vset(2.0f * kSh3b) * z * (x * v[10] - y * v[14]) + c * v[11];
    vz = vz + vset(kSh3b) * (vset(2.0f) * xy * v[10] + x2_y2 * v[14]) - vset(2.0f * kSh3c) * z * (y * v[11] + x * v[13]) + (vset(3.0f * kSh3e) * z2 - vset(kSh3f)) * v[12];
  }
  out[0] = vx, out[1] = vy, out[2] = vz;
}

NSE_INLINE vf direction(const Camera& cam, const vf* mean, vf* d) {
  for (int i = 0; i < 3; ++i) d[i] = mean[i] - vset(cam.centre[i]);
  const vf inv_norm = vset(1.0f) / vsqrt(vmax(dot3(d, d), vset(1e-30f)));
  for (int i = 0; i < 3; ++i) d[i] = d[i] * inv_norm;
  return inv_norm;
}

int feature_channels(const NseProjectArgs& a) { return a.color_channels + a.extra_channels + a.with_depth; }

int project_forward(const NseProjectArgs* args) {
  const NseProjectArgs& a = *args;
  const int64_t n = a.gaussians, tasks = ceil_div(n, kGaussiansPerTask);
  const int features = feature_channels(a);
  const int bases = (a.sh_degree + 1) * (a.sh_degree + 1);
  int* bad = static_cast<int*>(calloc(tasks ? tasks : 1, sizeof(int)));
  if (!bad) return NSE_OUT_OF_MEMORY;
  auto body = [&](int64_t task) {
    const int64_t end = min64(n, (task + 1) * kGaussiansPerTask);
    for (int64_t i = task * kGaussiansPerTask; i < end; i += VW) {
      const int count = (int)min64(VW, end - i);
      const vm live = first_lanes(count);
      vf mean[3], q[4], s[3], rotation[9], m[9], opacity[1];
      load_columns(a.means + 3 * i, 3, count, mean);
      load_columns(a.quats + 4 * i, 4, count, q);
      load_columns(a.scales + 3 * i, 3, count, s);
      load_columns(a.opacities + i, 1, count, opacity);
      if (!all_finite(mean, 3)) bad[task] |= NSE_BAD_MEANS;
      if (!all_finite(q, 4)) bad[task] |= NSE_BAD_QUATS;
      if (!all_finite(s, 3)) bad[task] |= NSE_BAD_SCALES;
      if (!all_finite(opacity, 1)) bad[task] |= NSE_BAD_OPACITIES;
      rotation_scale(q, s, rotation, m);
      for (int64_t c = 0; c < a.cameras; ++c) {
        const Camera cam = read_camera(a, c);
        const int64_t o = c * n + i;
        Projected p;
        project(a, cam, mean, m, p);
        const vm visible = vand(p.visible, live);
        const uint32_t bits = vbits(visible);
        alignas(64) float radius[VW];
        vstore(radius, vzero(visible, p.radius));
        for (int l = 0; l < count; ++l) a.radii[o + l] = (int32_t)radius[l];
        for (int k = 0; k < 2; ++k) p.mean2d[k] = vzero(visible, p.mean2d[k]);
        for (int k = 0; k < 3; ++k) p.conic[k] = vzero(visible, p.conic[k]);
        const vf depth = vzero(visible, p.camera_point[2]), compensation = vzero(visible, p.compensation);
        const vf opacity2d = a.antialiased ? opacity[0] * compensation : opacity[0];
        store_columns(a.means2d + 2 * o, 2, count, p.mean2d);
        store_columns(a.conics + 3 * o, 3, count, p.conic);
        store_columns(a.depths + o, 1, count, &depth);
        if (a.compensations) store_columns(a.compensations + o, 1, count, &compensation);
        store_columns(a.opacities2d + o, 1, count, &opacity2d);

        float* out = a.features + features * o;
        if (!bits) {
          memset(out, 0, sizeof(float) * features * count);
          continue;
        }
        alignas(64) float basis[16 * VW], depths[VW];
        vstore(depths, depth);
        if (a.sh_degree >= 0 && a.color_channels) {
          vf d[3], b[16];
          direction(cam, mean, d);
          sh_basis(a.sh_degree, d[0], d[1], d[2], b);
          for (int k = 0; k < bases; ++k) vstore(basis + k * VW, b[k]);
        }
        const float* colors = a.colors ? a.colors + (int64_t)a.color_stride * (a.colors_per_camera ? o : i) : nullptr;
        for (int l = 0; l < count; ++l, out += features) {
          if (!(bits >> l & 1)) {
            for (int k = 0; k < features; ++k) out[k] = 0.0f;
            continue;
          }
          float sum = 0.0f;
          if (a.color_channels && a.sh_degree >= 0) {
            const float* coeff = colors + (int64_t)a.color_stride * l;
            float rgb[3] = {0.5f, 0.5f, 0.5f};
            for (int k = 0; k < bases; ++k)
              for (int ch = 0; ch < 3; ++ch) rgb[ch] += basis[k * VW + l] * coeff[3 * k + ch];
            for (int ch = 0; ch < 3; ++ch) sum += rgb[ch], out[ch] = rgb[ch] > 0.0f ? rgb[ch] : 0.0f;
          } else {
            for (int ch = 0; ch < a.color_channels; ++ch) sum += out[ch] = colors[(int64_t)a.color_stride * l + ch];
          }
          if (!(fabsf(sum) <= FLT_MAX)) bad[task] |= NSE_BAD_COLORS;
          sum = 0.0f;
          for (int ch = 0; ch < a.extra_channels; ++ch)
            sum += out[a.color_channels + ch] = a.extra[(i + l) * a.extra_channels + ch];
          if (!(fabsf(sum) <= FLT_MAX)) bad[task] |= NSE_BAD_EXTRA;
          if (a.with_depth) out[features - 1] = depths[l];
        }
      }
    }
  };
  parallel(a.threads, tasks, body);
  int status = 0;
  for (int64_t t = 0; t < tasks; ++t) status |= bad[t];
  free(bad);
  return status;
}

NSE_INLINE float lane_sum(vf v) {
  alignas(64) float lane[VW];
  vstore(lane, v);
  float sum = 0.0f;
  for (int l = 0; l < VW; ++l) sum += lane[l];
  return sum;
}

int project_backward(const NseProjectArgs* args) {
  const NseProjectArgs& a = *args;
  const int64_t n = a.gaussians, tasks = ceil_div(n, kGaussiansPerTask);
  const int features = feature_channels(a);
  const int bases = (a.sh_degree + 1) * (a.sh_degree + 1);
  const bool want_camera = a.v_viewmats || a.v_camera_centres;
  const bool sh = a.sh_degree >= 0 && a.color_channels;
  float* camera_sums = nullptr;  // [tasks, C, 16]: 3 x 4 view matrix, then 3 of the camera centre
  if (want_camera) {
    camera_sums = static_cast<float*>(calloc(max64(1, tasks * a.cameras * 16), sizeof(float)));
    if (!camera_sums) return NSE_OUT_OF_MEMORY;
  }
  auto body = [&](int64_t task) {
    const int64_t end = min64(n, (task + 1) * kGaussiansPerTask);
    const vf zero = vset(0.0f);
    for (int64_t i = task * kGaussiansPerTask; i < end; i += VW) {
      const int count = (int)min64(VW, end - i);
      vf mean[3], q[4], s[3], rotation[9], m[9], opacity[1];
      load_columns(a.means + 3 * i, 3, count, mean);
      load_columns(a.quats + 4 * i, 4, count, q);
      load_columns(a.scales + 3 * i, 3, count, s);
      load_columns(a.opacities + i, 1, count, opacity);
      const vf inv_norm = rotation_scale(q, s, rotation, m);
      vf v_m[9], v_mean[3] = {zero, zero, zero}, v_opacity = zero;
      for (int k = 0; k < 9; ++k) v_m[k] = zero;
      if (a.v_colors && !a.colors_per_camera) memset(a.v_colors + a.color_stride * i, 0, sizeof(float) * a.color_stride * count);
      if (a.v_extra) memset(a.v_extra + a.extra_channels * i, 0, sizeof(float) * a.extra_channels * count);
      for (int64_t c = 0; c < a.cameras; ++c) {
        const int64_t o = c * n + i;
        float* v_colors = a.v_colors ? a.v_colors + (int64_t)a.color_stride * (a.colors_per_camera ? o : i) : nullptr;
        if (v_colors && a.colors_per_camera) memset(v_colors, 0, sizeof(float) * a.color_stride * count);
        alignas(64) float seen[VW];
        for (int l = 0; l < VW; ++l) seen[l] = l < count && a.radii[o + l] > 0 ? 1.0f : 0.0f;
        const vm visible = vgt(vload(seen), zero);
        const uint32_t bits = vbits(visible);
        if (!bits) continue;
        const Camera cam = read_camera(a, c);
        const float* r = cam.rotation;
        Projected p;
        project(a, cam, mean, m, p);

        vf v_mean2d[2] = {zero, zero}, v_conic[3] = {zero, zero, zero}, v_depth = zero, v_opacity2d = zero;
        if (a.v_means2d) load_columns(a.v_means2d + 2 * o, 2, count, v_mean2d);
        if (a.v_conics) load_columns(a.v_conics + 3 * o, 3, count, v_conic);
        if (a.v_depths) load_columns(a.v_depths + o, 1, count, &v_depth);
        if (a.v_opacities2d) load_columns(a.v_opacities2d + o, 1, count, &v_opacity2d);

        // conic = inverse(covariance): dL/dcov = -conic (dL/dconic) conic
        const vf A = p.conic[0], B = p.conic[1], C = p.conic[2], half_b = vset(0.5f) * v_conic[1];
        const vf pg00 = vfma(A, v_conic[0], B * half_b), pg01 = vfma(A, half_b, B * v_conic[2]);
        const vf pg10 = vfma(B, v_conic[0], C * half_b), pg11 = vfma(B, half_b, C * v_conic[2]);
        vf g00 = zero - vfma(pg00, A, pg01 * B), g01 = zero - vfma(pg00, B, pg01 * C), g11 = zero - vfma(pg10, B, pg11 * C);
        if (a.antialiased) {
          v_opacity = v_opacity + vzero(visible, v_opacity2d * p.compensation);
          // gsplat's 1e-6 keeps the gradient of sqrt finite for flat Gaussians
          const vf v_square = v_opacity2d * opacity[0] * vset(0.5f) / (p.compensation + vset(1e-6f));
          const vf rest = vset(1.0f) - p.compensation * p.compensation, eps_det = vset(a.eps2d) * p.inv_det;
          g00 = vfma(v_square, rest * A - eps_det, g00);
          g01 = vfma(v_square, rest * B, g01);
          g11 = vfma(v_square, rest * C - eps_det, g11);
        } else {
          v_opacity = v_opacity + vzero(visible, v_opacity2d);
        }
        // covariance = T T^t, T = JR M
        vf v_t0[3], v_t1[3], v_jr0[3], v_jr1[3];
        for (int k = 0; k < 3; ++k) {
          v_t0[k] = vset(2.0f) * vfma(g00, p.t0[k], g01 * p.t1[k]);
          v_t1[k] = vset(2.0f) * vfma(g01, p.t0[k], g11 * p.t1[k]);
        }
        for (int j = 0; j < 3; ++j) {
          v_jr0[j] = dot3(v_t0, m + 3 * j);
          v_jr1[j] = dot3(v_t1, m + 3 * j);
          for (int k = 0; k < 3; ++k)
            v_m[3 * j + k] = v_m[3 * j + k] + vzero(visible, vfma(p.jr0[j], v_t0[k], p.jr1[j] * v_t1[k]));
        }
        vf v_j00 = zero, v_j02 = zero, v_j11 = zero, v_j12 = zero;
        for (int k = 0; k < 3; ++k) {
          v_j00 = vfma(v_jr0[k], vset(r[k]), v_j00);
          v_j02 = vfma(v_jr0[k], vset(r[6 + k]), v_j02);
          v_j11 = vfma(v_jr1[k], vset(r[3 + k]), v_j11);
          v_j12 = vfma(v_jr1[k], vset(r[6 + k]), v_j12);
        }
        const vf fx_rz = vset(cam.fx) * p.rz, fy_rz = vset(cam.fy) * p.rz, rz2_fx = fx_rz * p.rz, rz2_fy = fy_rz * p.rz;
        vf v_point[3];
        v_point[0] = fx_rz * v_mean2d[0] - vzero(p.inside_x, rz2_fx * v_j02);
        v_point[1] = fy_rz * v_mean2d[1] - vzero(p.inside_y, rz2_fy * v_j12);
        v_point[2] = v_depth - rz2_fx * p.camera_point[0] * v_mean2d[0] - rz2_fy * p.camera_point[1] * v_mean2d[1];
        v_point[2] = v_point[2] - rz2_fx * v_j00 - rz2_fy * v_j11;
        // j02 = -fx rz tan_x: tan_x itself falls with z only where it is not clamped
        v_point[2] = v_point[2] + rz2_fx * p.tan_x * (v_j02 + vzero(p.inside_x, v_j02)) + rz2_fy * p.tan_y * (v_j12 + vzero(p.inside_y, v_j12));

        // features
        vf v_dir_sum[3] = {zero, zero, zero};
        if (a.v_features) {
          const float* v_out = a.v_features + features * o;
          if (a.with_depth) {
            alignas(64) float v[VW];
            for (int l = 0; l < VW; ++l) v[l] = l < count ? v_out[l * features + features - 1] : 0.0f;
            v_point[2] = v_point[2] + vload(v);
          }
          if (a.v_extra)
            for (int l = 0; l < count; ++l)
              if (bits >> l & 1)
                for (int k = 0; k < a.extra_channels; ++k)
                  a.v_extra[(i + l) * a.extra_channels + k] += v_out[l * features + a.color_channels + k];
          if (sh) {
            vf d[3], b[16];
            const vf inv_length = direction(cam, mean, d);
            sh_basis(a.sh_degree, d[0], d[1], d[2], b);
            alignas(64) float basis[16 * VW], v_basis[16 * VW];
            for (int k = 0; k < bases; ++k) vstore(basis + k * VW, b[k]), vstore(v_basis + k * VW, zero);
            const float* colors = a.colors + (int64_t)a.color_stride * (a.colors_per_camera ? o : i);
            const float* rgb = a.features + features * o;
            for (int l = 0; l < count; ++l) {
              if (!(bits >> l & 1)) continue;
              float v[3];  // the colour is clamped at 0
              for (int ch = 0; ch < 3; ++ch) v[ch] = rgb[l * features + ch] > 0.0f ? v_out[l * features + ch] : 0.0f;
              const float* coeff = colors + (int64_t)a.color_stride * l;
              for (int k = 0; k < bases; ++k)
                v_basis[k * VW + l] = v[0] * coeff[3 * k] + v[1] * coeff[3 * k + 1] + v[2] * coeff[3 * k + 2];
              if (v_colors) {
                float* v_coeff = v_colors + (int64_t)a.color_stride * l;
                for (int k = 0; k < bases; ++k)
                  for (int ch = 0; ch < 3; ++ch) v_coeff[3 * k + ch] += basis[k * VW + l] * v[ch];
              }
            }
            if (a.sh_degree > 0) {
              vf v_b[16], v_d[3];
              for (int k = 0; k < bases; ++k) v_b[k] = vload(v_basis + k * VW);
              sh_basis_vjp(a.sh_degree, d[0], d[1], d[2], v_b, v_d);
              const vf along = dot3(v_d, d);
              for (int k = 0; k < 3; ++k) v_dir_sum[k] = vzero(visible, (v_d[k] - along * d[k]) * inv_length);
            }
          } else if (v_colors) {
            for (int l = 0; l < count; ++l)
              if (bits >> l & 1)
                for (int ch = 0; ch < a.color_channels; ++ch) v_colors[(int64_t)a.color_stride * l + ch] += v_out[l * features + ch];
          }
        }
        for (int k = 0; k < 3; ++k) v_point[k] = vzero(visible, v_point[k]);
        for (int k = 0; k < 3; ++k)
          v_mean[k] = v_mean[k] + v_dir_sum[k] + vfma(vset(r[k]), v_point[0], vfma(vset(r[3 + k]), v_point[1], vset(r[6 + k]) * v_point[2]));
        if (want_camera) {
          float* sums = camera_sums + (task * a.cameras + c) * 16;
          const vf j00 = fx_rz, j11 = fy_rz, j02 = zero - fx_rz * p.tan_x, j12 = zero - fy_rz * p.tan_y;
          for (int k = 0; k < 3; ++k) {
            sums[k] += lane_sum(vzero(visible, vfma(v_point[0], mean[k], j00 * v_jr0[k])));
            sums[4 + k] += lane_sum(vzero(visible, vfma(v_point[1], mean[k], j11 * v_jr1[k])));
            sums[8 + k] += lane_sum(vzero(visible, vfma(v_point[2], mean[k], vfma(j02, v_jr0[k], j12 * v_jr1[k]))));
            sums[4 * k + 3] += lane_sum(v_point[k]);
            sums[12 + k] -= lane_sum(v_dir_sum[k]);
          }
        }
      }
      // M = rotation(q / |q|) diag(s)
      vf v_rotation[9], v_scale[3] = {zero, zero, zero};
      for (int j = 0; j < 9; ++j) {
        v_scale[j % 3] = vfma(rotation[j], v_m[j], v_scale[j % 3]);
        v_rotation[j] = v_m[j] * s[j % 3];
      }
      const vf w = q[0], x = q[1], y = q[2], z = q[3], two = vset(2.0f);
      const vf* v = v_rotation;
      vf v_q[4];
      v_q[0] = two * (x * (v[7] - v[5]) + y * (v[2] - v[6]) + z * (v[3] - v[1]));
      v_q[1] = two * (y * (v[1] + v[3]) + z * (v[2] + v[6]) + w * (v[7] - v[5]) - two * x * (v[4] + v[8]));
      v_q[2] = two * (x * (v[1] + v[3]) + z * (v[5] + v[7]) + w * (v[2] - v[6]) - two * y * (v[0] + v[8]));
      v_q[3] = two * (x * (v[2] + v[6]) + y * (v[5] + v[7]) + w * (v[3] - v[1]) - two * z * (v[0] + v[4]));
      const vf along = vfma(v_q[0], w, vfma(v_q[1], x, vfma(v_q[2], y, v_q[3] * z)));
      const vm sound = finite(inv_norm);  // a zero quaternion is never drawn; its gradient is 0, not NaN
      for (int k = 0; k < 4; ++k) v_q[k] = vzero(sound, (v_q[k] - along * q[k]) * inv_norm);
      for (int k = 0; k < 3; ++k) v_scale[k] = vzero(sound, v_scale[k]);
      store_columns(a.v_means + 3 * i, 3, count, v_mean);
      store_columns(a.v_quats + 4 * i, 4, count, v_q);
      store_columns(a.v_scales + 3 * i, 3, count, v_scale);
      store_columns(a.v_opacities + i, 1, count, &v_opacity);
    }
  };
  parallel(a.threads, tasks, body);
  if (want_camera) {
    for (int64_t c = 0; c < a.cameras; ++c)
      for (int k = 0; k < 15; ++k) {
        double sum = 0.0;
        for (int64_t t = 0; t < tasks; ++t) sum += camera_sums[(t * a.cameras + c) * 16 + k];
        if (k < 12 && a.v_viewmats) a.v_viewmats[16 * c + k] = (float)sum;
        if (k >= 12 && a.v_camera_centres) a.v_camera_centres[3 * c + k - 12] = (float)sum;
      }
    free(camera_sums);
  }
  return 0;
}

// --------------------------------------------------------------------------------------------------- binning

// A record is what the raster stage needs of one visible Gaussian: this header, then its features. The quadratic form is a
// sum of two squares, sigma * log2(e) = e^2 + h^2 with e = ex dx + ey dy and h = hy dy (Cholesky), so that rounding cannot
// make it negative. alpha >= 1/255 means that this form is at most `reach`.
enum { kX = 0, kY = 1, kEx = 2, kEy = 3, kHy = 4, kLogOpacity = 5, kReach = 6, kSlope = 7 };  // kSlope: ey / ex

// Bit b is set if block b (4 x 4 pixels, row-major in the tile) has a point where the form is at most `reach`.
NSE_INLINE uint32_t block_mask(const float* record, float tile_x, float tile_y) {
  alignas(64) static const float kOffsetX[16] = {0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12};
  alignas(64) static const float kOffsetY[16] = {0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12};
  const vf zero = vset(0.0f), s = vset(record[kSlope]), ex = vset(record[kEx]), ey = vset(record[kEy]), hy = vset(record[kHy]);
  const vf slope = vset(record[kEx] * record[kEy] / (record[kHy] * record[kHy] + record[kEy] * record[kEy]));  // b / c
  // A little slack, because the pixels are tested with other roundings.
  const vf reach = vset(record[kReach] * 1.00001f + 1e-3f);
  const float left = tile_x + 0.5f - record[kX], top = tile_y + 0.5f - record[kY];
  uint32_t mask = 0;
  for (int part = 0; part < kParts; ++part) {
    // pixel centres of a block span 3 px
    const vf x0 = vload(kOffsetX + part * VW) + vset(left), x1 = x0 + vset(3.0f);
    const vf y0 = vload(kOffsetY + part * VW) + vset(top), y1 = y0 + vset(3.0f);
    // The minimum of the form over a rectangle lies at its centre (if inside) or on an edge that faces the centre.
    const vf y_near = vmin(vmax(zero, y0), y1), x_near = vmin(vmax(zero, x0), x1);
    const vf x_best = vmin(vmax(zero - s * y_near, x0), x1), y_best = vmin(vmax(zero - slope * x_near, y0), y1);
    const vf e0 = vfma(ey, y_near, ex * x_best), e1 = vfma(ey, y_best, ex * x_near), h0 = hy * y_near, h1 = hy * y_best;
    const vf q0 = vfma(e0, e0, h0 * h0), q1 = vfma(e1, e1, h1 * h1);
    mask |= vbits(vge(reach, vmin(q0, q1))) << (part * VW);
  }
  return mask;
}

struct TileRect {
  int16_t x0, y0, x1, y1;  // x1, y1 exclusive
};

inline float clampf(float v, float lo, float hi) { return v < lo ? lo : (v > hi ? hi : v); }

// gsplat's square of 3 standard deviations, cut to the box of the ellipse where alpha can reach 1/255.
TileRect tile_rect(const float* record, float radius, int tiles_x, int tiles_y) {
  const float x = record[kX], y = record[kY], reach = record[kReach];
  TileRect rect = {0, 0, 0, 0};
  if (!(reach >= 0.0f)) return rect;
  const float root = sqrtf(reach) * 1.0001f, half_y = root / record[kHy], across = root / record[kEx], along = record[kSlope] * half_y;
  const float half_x = sqrtf(across * across + along * along) + 0.01f;
  const float inv = 1.0f / kTile;
  const float x0 = floorf((x - radius) * inv), x1 = ceilf((x + radius) * inv);
  const float y0 = floorf((y - radius) * inv), y1 = ceilf((y + radius) * inv);
  const float ex0 = floorf((x - half_x) * inv), ex1 = floorf((x + half_x) * inv) + 1.0f;
  const float ey0 = floorf((y - half_y - 0.01f) * inv), ey1 = floorf((y + half_y + 0.01f) * inv) + 1.0f;
  rect.x0 = (int16_t)clampf(ex0 > x0 ? ex0 : x0, 0.0f, (float)tiles_x);
  rect.x1 = (int16_t)clampf(ex1 < x1 ? ex1 : x1, 0.0f, (float)tiles_x);
  rect.y0 = (int16_t)clampf(ey0 > y0 ? ey0 : y0, 0.0f, (float)tiles_y);
  rect.y1 = (int16_t)clampf(ey1 < y1 ? ey1 : y1, 0.0f, (float)tiles_y);
  if (rect.x1 <= rect.x0 || rect.y1 <= rect.y0) rect.x1 = rect.x0, rect.y1 = rect.y0;
  return rect;
}

struct DepthKey {
  uint32_t key, index;
};

// Stable sort by key, 3 passes of 11 bits. Depths are positive, so their bits sort as integers.
DepthKey* radix_sort(DepthKey* from, DepthKey* to, int64_t n) {
  static constexpr int kBits = 11, kBuckets = 1 << kBits;
  uint32_t count[3][kBuckets];
  memset(count, 0, sizeof count);
  for (int64_t i = 0; i < n; ++i)
    for (int pass = 0; pass < 3; ++pass) ++count[pass][from[i].key >> (kBits * pass) & (kBuckets - 1)];
  for (int pass = 0; pass < 3; ++pass) {
    uint32_t sum = 0;
    for (int b = 0; b < kBuckets; ++b) {
      const uint32_t here = count[pass][b];
      count[pass][b] = sum;
      sum += here;
    }
    for (int64_t i = 0; i < n; ++i) to[count[pass][from[i].key >> (kBits * pass) & (kBuckets - 1)]++] = from[i];
    DepthKey* swap = from;
    from = to;
    to = swap;
  }
  return from;
}

#define RESERVE(type, name, buffer, count)                                                    \
  type* name = static_cast<type*>(nse_reserve(&(buffer), sizeof(type) * (size_t)max64(1, count))); \
  if (!name) return NSE_OUT_OF_MEMORY

// Fills the frame up to isect_mask. "Visible" indices count the drawn Gaussians in the order of the input.
int bin(const NseRasterArgs& a, Frame& f) {
  const int64_t n = a.gaussians, tiles_x = f.tiles_x, tiles_y = f.tiles_y, tiles = tiles_x * tiles_y;
  const int64_t all_tiles = a.cameras * tiles;
  const int channels = a.channels;
  f.record_stride = (kRecordHeader + channels + 15) / 16 * 16;
  const int64_t stride = f.record_stride;
  RESERVE(int32_t, rank, f.rank, a.cameras * n);
  RESERVE(uint32_t, tile_base, f.tile_base, all_tiles + 1);

  int64_t visible = 0;
  for (int64_t i = 0; i < a.cameras * n; ++i) {
    const bool drawn = a.radii[i] > 0;
    rank[i] = drawn ? (int32_t)visible : -1;
    visible += drawn;
  }
  f.visible = visible;
  RESERVE(uint32_t, order, f.order, visible);
  RESERVE(uint32_t, slot_base, f.slot_base, visible + 1);
  RESERVE(float, records, f.records, visible * stride);
  RESERVE(TileRect, rects, f.scratch[2], visible);
  RESERVE(uint32_t, candidate_base, f.scratch[3], visible + 1);
  RESERVE(DepthKey, keys, f.scratch[0], visible);
  RESERVE(DepthKey, keys_other, f.scratch[1], visible);
  for (int64_t i = 0, v = 0; i < a.cameras * n; ++i)
    if (rank[i] >= 0) order[v++] = (uint32_t)i;

  // records and candidate tiles
  const int64_t chunks = max64(1, min64(ceil_div(visible, 256), 4 * (int64_t)a.threads));
  const int64_t chunk_size = max64(1, ceil_div(visible, chunks));
  auto build = [&](int64_t chunk) {
    const int64_t end = min64(visible, (chunk + 1) * chunk_size);
    for (int64_t v = chunk * chunk_size; v < end; ++v) {
      const int64_t g = order[v];
      memcpy(&keys[v].key, &a.depths[g], 4);
      keys[v].index = (uint32_t)v;
      float* record = records + v * stride;
      const double ca = a.conics[3 * g], cb = a.conics[3 * g + 1], cc = a.conics[3 * g + 2];
      const double slope = cb / ca, schur = cc - cb * slope;
      const float opacity = a.opacities[g];
      const double ex = sqrt(0.5 * kLog2e * ca);
      record[kX] = a.means2d[2 * g], record[kY] = a.means2d[2 * g + 1];
      record[kEx] = (float)ex;
      record[kEy] = (float)(ex * slope);
      record[kHy] = (float)sqrt(0.5 * kLog2e * schur);
      record[kLogOpacity] = opacity > 0.0f ? log2f(opacity) : -1e30f;
      record[kReach] = record[kLogOpacity] - kLogAlphaMin;
      if (!(record[kEx] > 0.0f && record[kHy] > 0.0f)) record[kReach] = -1.0f;  // not an ellipse
      record[kSlope] = (float)slope;
      const float* feature = a.features + g * channels;
      for (int k = 0; k < channels; ++k) record[kRecordHeader + k] = feature[k];
      for (int64_t k = kRecordHeader + channels; k < stride; ++k) record[k] = 0.0f;
      rects[v] = tile_rect(record, (float)a.radii[g], (int)tiles_x, (int)tiles_y);
      candidate_base[v + 1] = (uint32_t)(rects[v].x1 - rects[v].x0) * (uint32_t)(rects[v].y1 - rects[v].y0);
    }
  };
  parallel(a.threads, chunks, build);
  candidate_base[0] = 0;
  uint64_t candidates = 0;
  for (int64_t v = 0; v < visible; ++v) {
    candidates += candidate_base[v + 1];
    if (candidates > 0x7fffffffu) return NSE_TOO_MANY_INTERSECTIONS;
    candidate_base[v + 1] = (uint32_t)candidates;
  }

  // block masks of the candidates
  RESERVE(uint16_t, masks, f.scratch[4], candidates);
  auto cover = [&](int64_t chunk) {
    const int64_t end = min64(visible, (chunk + 1) * chunk_size);
    for (int64_t v = chunk * chunk_size; v < end; ++v) {
      const TileRect rect = rects[v];
      uint16_t* mask = masks + candidate_base[v];
      const float* record = records + v * stride;
      uint32_t used = 0;
      for (int ty = rect.y0; ty < rect.y1; ++ty)
        for (int tx = rect.x0; tx < rect.x1; ++tx) {
          const uint32_t bits = block_mask(record, (float)(tx * kTile), (float)(ty * kTile));
          *mask++ = (uint16_t)bits;
          used += bits != 0;
        }
      slot_base[v + 1] = used;
    }
  };
  parallel(a.threads, chunks, cover);
  slot_base[0] = 0;
  for (int64_t v = 0; v < visible; ++v) slot_base[v + 1] += slot_base[v];
  const uint32_t total = slot_base[visible];
  f.intersections = total;

  // Near to far, camera by camera; then every chunk of that order appends to the lists of the tiles.
  const DepthKey* sorted = radix_sort(keys, keys_other, visible);
  RESERVE(uint32_t, histogram, f.scratch[5], chunks * all_tiles);
  auto count = [&](int64_t chunk) {
    uint32_t* here = histogram + chunk * all_tiles;
    memset(here, 0, sizeof(uint32_t) * all_tiles);
    const int64_t end = min64(visible, (chunk + 1) * chunk_size);
    for (int64_t i = chunk * chunk_size; i < end; ++i) {
      const uint32_t v = sorted[i].index;
      const TileRect rect = rects[v];
      const uint16_t* mask = masks + candidate_base[v];
      uint32_t* camera_here = here + order[v] / n * tiles;
      for (int ty = rect.y0; ty < rect.y1; ++ty)
        for (int tx = rect.x0; tx < rect.x1; ++tx) camera_here[ty * tiles_x + tx] += *mask++ != 0;
    }
  };
  parallel(a.threads, chunks, count);
  uint32_t sum = 0;
  for (int64_t t = 0; t < all_tiles; ++t) {
    tile_base[t] = sum;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const uint32_t here = histogram[chunk * all_tiles + t];
      histogram[chunk * all_tiles + t] = sum;
      sum += here;
    }
  }
  tile_base[all_tiles] = sum;

  RESERVE(uint32_t, isect_rank, f.isect_rank, total);
  RESERVE(uint32_t, isect_slot, f.isect_slot, total);
  RESERVE(uint16_t, isect_mask, f.isect_mask, total);
  RESERVE(uint8_t, slot_used, f.slot_used, total);
  memset(slot_used, 0, total);
  auto fill = [&](int64_t chunk) {
    uint32_t* next = histogram + chunk * all_tiles;
    const int64_t end = min64(visible, (chunk + 1) * chunk_size);
    for (int64_t i = chunk * chunk_size; i < end; ++i) {
      const uint32_t v = sorted[i].index;
      const TileRect rect = rects[v];
      const uint16_t* mask = masks + candidate_base[v];
      uint32_t* camera_next = next + order[v] / n * tiles;
      uint32_t slot = slot_base[v];
      for (int ty = rect.y0; ty < rect.y1; ++ty)
        for (int tx = rect.x0; tx < rect.x1; ++tx, ++mask)
          if (*mask) {
            const uint32_t at = camera_next[ty * tiles_x + tx]++;
            isect_rank[at] = v;
            isect_slot[at] = slot++;
            isect_mask[at] = *mask;
          }
    }
  };
  parallel(a.threads, chunks, fill);
  return 0;
}

// ---------------------------------------------------------------------------------------------------- raster

// Pixel centres of a tile, relative to its corner: x by block column and lane, y by block row and lane.
#define NSE_ROW4(x) x + 0.5f, x + 1.5f, x + 2.5f, x + 3.5f
#define NSE_SAME4(y) y, y, y, y
#define NSE_BLOCK_X(x) NSE_ROW4(x), NSE_ROW4(x), NSE_ROW4(x), NSE_ROW4(x)
#define NSE_BLOCK_Y(y) NSE_SAME4(y + 0.5f), NSE_SAME4(y + 1.5f), NSE_SAME4(y + 2.5f), NSE_SAME4(y + 3.5f)
alignas(64) const float kCentreX[4 * 16] = {NSE_BLOCK_X(0), NSE_BLOCK_X(4), NSE_BLOCK_X(8), NSE_BLOCK_X(12)};
alignas(64) const float kCentreY[4 * 16] = {NSE_BLOCK_Y(0), NSE_BLOCK_Y(4), NSE_BLOCK_Y(8), NSE_BLOCK_Y(12)};

constexpr int kChunk = 128;  // Gaussians whose block lists are built at a time

struct Tile {
  int64_t x, y, camera;      // first pixel
  int64_t begin, end;        // intersections
  int64_t state;             // offset of the tile in transmittance and last
  int64_t width, height;     // pixels of the tile inside the image
};

Tile find_tile(const Frame& f, int64_t task) {
  const uint32_t* base = static_cast<const uint32_t*>(f.tile_base.data);
  const int64_t tiles = f.tiles_x * f.tiles_y, within = task % tiles;
  Tile t;
  t.camera = task / tiles;
  t.x = within % f.tiles_x * kTile, t.y = within / f.tiles_x * kTile;
  t.begin = base[task], t.end = base[task + 1];
  t.state = task * kTilePixels;
  t.width = min64(kTile, f.width - t.x), t.height = min64(kTile, f.height - t.y);
  return t;
}

// Calls body(lane index in the tile's block order, pixel index in the camera's image) for the pixels inside the image.
template <class F>
NSE_INLINE void for_each_pixel(const NseRasterArgs& a, const Tile& t, F body) {
  for (int64_t y = 0; y < t.height; ++y)
    for (int64_t x = 0; x < t.width; ++x)
      body((int)((y / kBlock * 4 + x / kBlock) * 16 + y % kBlock * 4 + x % kBlock), (t.y + y) * a.width + t.x + x);
}

// The form of a Gaussian at the pixels of a tile: e = e0 - ex u - ey v, h = h0 - hy v, where u, v are relative to the tile.
NSE_INLINE void form_at_tile(const float* record, const Tile& t, float* e0, float* h0) {
  const float dx = record[kX] - (float)t.x, dy = record[kY] - (float)t.y;
  *e0 = record[kEx] * dx + record[kEy] * dy;
  *h0 = record[kHy] * dy;
}

struct Splat {
  vf e, h, raw, alpha;  // the form's two roots; opacity * exp(-sigma), and clamped
  vm hit;
};

NSE_INLINE Splat splat_at(const float* record, vf e0, vf h0, vf u, vf v) {
  Splat s;
  s.e = vfnma(vset(record[kEy]), v, vfnma(vset(record[kEx]), u, e0));
  s.h = vfnma(vset(record[kHy]), v, h0);
  const vf exponent = vfnma(s.h, s.h, vfnma(s.e, s.e, vset(record[kLogOpacity])));
  s.raw = vexp2(exponent);
  s.alpha = vmin(s.raw, vset(kAlphaMax));
  s.hit = vge(exponent, vset(kLogAlphaMin));
  return s;
}

// CH: number of channels known at compile time, or 0.
template <int CH>
void forward_tile(const NseRasterArgs& a, Frame& f, int64_t task, float* color) {
  const Tile t = find_tile(f, task);
  const int channels = CH ? CH : a.channels;
  const uint32_t* isect_rank = static_cast<const uint32_t*>(f.isect_rank.data);
  const uint32_t* isect_slot = static_cast<const uint32_t*>(f.isect_slot.data);
  uint16_t* isect_mask = static_cast<uint16_t*>(f.isect_mask.data);
  uint8_t* slot_used = static_cast<uint8_t*>(f.slot_used.data);
  const float* records = static_cast<const float*>(f.records.data);
  const int64_t stride = f.record_stride;
  float* closed = static_cast<float*>(f.transmittance.data) + t.state;  // transmittance behind the last contribution
  int32_t* last = static_cast<int32_t*>(f.last.data) + t.state;
  alignas(64) float open[kTilePixels];  // 1 until the pixel is closed
  memset(open, 0, sizeof open);
  for (int i = 0; i < kTilePixels; ++i) closed[i] = 1.0f, last[i] = -1;
  memset(color, 0, sizeof(float) * kTilePixels * channels);  // [block, channel, lane]
  uint32_t alive = 0;
  for_each_pixel(a, t, [&](int lane, int64_t) {
    open[lane] = 1.0f;
    alive |= 1u << (lane >> 4);
  });

  constexpr int kLocalStride = kRecordHeader + (CH ? CH : 0);
  alignas(64) float local[kChunk * kLocalStride];  // records with e0, h0 in the place of the mean
  uint16_t list[16][kChunk], contributes[kChunk];
  int64_t start = t.begin;
  for (; start < t.end && alive; start += kChunk) {
    const int size = (int)min64(kChunk, t.end - start);
    const uint32_t* rank = isect_rank + start;
    int length[16] = {0};
    for (int j = 0; j < size; ++j) {
      __builtin_prefetch(records + rank[j + 8 < size ? j + 8 : j] * stride);
      const float* record = records + rank[j] * stride;
      float* to = local + j * kLocalStride;
      memcpy(to, record, sizeof(float) * kLocalStride);
      form_at_tile(record, t, to + kX, to + kY);
      contributes[j] = 0;
      for (uint32_t bits = isect_mask[start + j] & alive; bits; bits &= bits - 1) {
        const int b = __builtin_ctz(bits);
        list[b][length[b]++] = (uint16_t)j;
      }
    }
    const int32_t first = (int32_t)(start - t.begin);
    for (uint32_t bits = alive; bits; bits &= bits - 1) {
      const int b = __builtin_ctz(bits);
      bool block_open = false;
      for (int part = 0; part < kParts; ++part) {
        const int lane = b * 16 + part * VW;
        const vf u = vload(kCentreX + b % 4 * 16 + part * VW), v = vload(kCentreY + b / 4 * 16 + part * VW);
        vf transmittance = vload(closed + lane);
        vm open_lanes = vgt(vload(open + lane), vset(0.0f));
        vi last_j = viload(last + lane);
        float* block_color = color + b * 16 * channels + part * VW;
        vf sum[CH ? CH : 1];
        if (CH) {
#pragma GCC unroll 8
          for (int k = 0; k < CH; ++k) sum[k] = vload(block_color + 16 * k);
        }
        if (vany(open_lanes)) {
          for (int q = 0; q < length[b]; ++q) {
            const int j = list[b][q];
            const float* record = local + j * kLocalStride;
            const float* feature = CH ? record + kRecordHeader : records + rank[j] * stride + kRecordHeader;
            const Splat s = splat_at(record, vset(record[kX]), vset(record[kY]), u, v);
            const vf light = s.alpha * transmittance, next = transmittance - light;
            const vm hit = vand(open_lanes, s.hit), lit = vand(hit, vgt(next, vset(kTransmittanceStop)));
            const vf weight = vzero(lit, light);
            if (CH) {
#pragma GCC unroll 8
              for (int k = 0; k < CH; ++k) sum[k] = vfma(vset(feature[k]), weight, sum[k]);
            } else {
              for (int k = 0; k < channels; ++k)
                vstore(block_color + 16 * k, vfma(vset(feature[k]), weight, vload(block_color + 16 * k)));
            }
            transmittance = vsel(lit, next, transmittance);
            last_j = visel(lit, viset(first + j), last_j);
            contributes[j] |= (uint16_t)(vany(lit) << b);
            const vm closing = vandnot(hit, lit);
            if (vany(closing)) {
              open_lanes = vandnot(open_lanes, closing);
              if (!vany(open_lanes)) break;
            }
          }
        }
        vstore(open + lane, vzero(open_lanes, vset(1.0f)));
        vstore(closed + lane, transmittance);
        vistore(last + lane, last_j);
        if (CH) {
#pragma GCC unroll 8
          for (int k = 0; k < CH; ++k) vstore(block_color + 16 * k, sum[k]);
        }
        block_open |= vany(open_lanes);
      }
      if (!block_open) alive &= ~(1u << b);
    }
    for (int j = 0; j < size; ++j) {
      isect_mask[start + j] = contributes[j];
      slot_used[isect_slot[start + j]] = contributes[j] != 0;
    }
  }
  for (; start < t.end; ++start) isect_mask[start] = 0;

  const int64_t image = t.camera * a.width * a.height;
  const float* background = a.backgrounds ? a.backgrounds + t.camera * channels : nullptr;
  for_each_pixel(a, t, [&](int lane, int64_t pixel) {
    const float transmittance = closed[lane], alpha = 1.0f - transmittance;
    float* out = a.render + (image + pixel) * channels;
    const float* in = color + (lane >> 4) * 16 * channels + (lane & 15);
    for (int k = 0; k < channels; ++k) out[k] = in[16 * k] + (background ? transmittance * background[k] : 0.0f);
    if (a.normalise_last) out[channels - 1] /= alpha > 1e-10f ? alpha : 1e-10f;
    a.alpha[image + pixel] = alpha;
  });
}

constexpr int kSlotGeometry = 8;  // after the channels: sums of g e, g h, |g e|, |g dform/dy| / 2, g e e, g e h, g h h, g

template <int CH, bool ABS>
void backward_tile(const NseRasterArgs& a, Frame& f, int64_t task, float* state, float* background_sums) {
  const Tile t = find_tile(f, task);
  const int channels = CH ? CH : a.channels;
  const uint32_t* isect_rank = static_cast<const uint32_t*>(f.isect_rank.data);
  const uint32_t* isect_slot = static_cast<const uint32_t*>(f.isect_slot.data);
  const uint16_t* isect_mask = static_cast<const uint16_t*>(f.isect_mask.data);
  const float* records = static_cast<const float*>(f.records.data);
  float* slots = static_cast<float*>(f.scratch[6].data);
  const int64_t stride = f.record_stride, slot_stride = f.slot_stride;
  const float* closed = static_cast<const float*>(f.transmittance.data) + t.state;
  const int32_t* last = static_cast<const int32_t*>(f.last.data) + t.state;

  float* v_color = state;                          // [block, channel, lane]
  float* behind = v_color + kTilePixels * channels;  // dL/d(light from behind), per pixel
  float* front = behind + kTilePixels;             // transmittance in front of the splats visited so far
  memset(state, 0, sizeof(float) * kTilePixels * (channels + 1));
  memcpy(front, closed, sizeof(float) * kTilePixels);
  int32_t furthest = -1;
  for (int i = 0; i < kTilePixels; ++i) furthest = last[i] > furthest ? last[i] : furthest;

  const int64_t image = t.camera * a.width * a.height;
  const float* background = a.backgrounds ? a.backgrounds + t.camera * channels : nullptr;
  if (background_sums) memset(background_sums, 0, sizeof(float) * channels);
  for_each_pixel(a, t, [&](int lane, int64_t pixel) {
    float* v = v_color + (lane >> 4) * 16 * channels + (lane & 15);
    const float transmittance = closed[lane];
    float v_alpha = a.v_alpha ? a.v_alpha[image + pixel] : 0.0f;
    if (a.v_render) {
      const float* in = a.v_render + (image + pixel) * channels;
      for (int k = 0; k < channels; ++k) v[16 * k] = in[k];
      if (a.normalise_last) {
        const float alpha = 1.0f - transmittance, divisor = alpha > 1e-10f ? alpha : 1e-10f;
        const float v_last = in[channels - 1] / divisor;
        if (alpha >= 1e-10f) v_alpha -= v_last * a.render[(image + pixel) * channels + channels - 1];
        v[16 * (channels - 1)] = v_last;
      }
    }
    if (background)
      for (int k = 0; k < channels; ++k) v_alpha -= background[k] * v[16 * k];
    if (background_sums)
      for (int k = 0; k < channels; ++k) background_sums[k] += transmittance * v[16 * k];
    behind[lane] = -transmittance * v_alpha;
  });

  constexpr int kGradients = CH ? (CH + kSlotGeometry + 15) / 16 * 16 : 16;
  for (int64_t j = furthest; j >= 0; --j) {
    if (j >= 8) {
      __builtin_prefetch(records + isect_rank[t.begin + j - 8] * stride);
      __builtin_prefetch(slots + isect_slot[t.begin + j - 8] * slot_stride, 1);
    }
    uint32_t bits = isect_mask[t.begin + j];
    if (!bits) continue;
    const float* record = records + isect_rank[t.begin + j] * stride;
    float* slot = slots + isect_slot[t.begin + j] * slot_stride;
    vf sum[kGradients];
#pragma GCC unroll 32
    for (int k = 0; k < kGradients; ++k) sum[k] = vset(0.0f);
    float* dynamic = front + kTilePixels;  // CH = 0: [channels, VW] sums in memory
    if (!CH) memset(dynamic, 0, sizeof(float) * VW * channels);
    constexpr int G = CH ? CH : 0;
    float e0, h0;
    form_at_tile(record, t, &e0, &h0);
    const vi position = viset((int32_t)j);
    for (; bits; bits &= bits - 1) {
      const int b = __builtin_ctz(bits);
      for (int part = 0; part < kParts; ++part) {
        const int lane = b * 16 + part * VW;
        const vf u = vload(kCentreX + b % 4 * 16 + part * VW), v_pixel = vload(kCentreY + b / 4 * 16 + part * VW);
        const Splat s = splat_at(record, vset(e0), vset(h0), u, v_pixel);
        const vm lit = vand(s.hit, vige(viload(last + lane), position));
        if (kParts > 1 && !vany(lit)) continue;
        const vf inverse = vrecip(vset(1.0f) - s.alpha);
        const vf old_front = vload(front + lane), new_front = old_front * inverse;
        vstore(front + lane, vsel(lit, new_front, old_front));
        const vf weight = vzero(lit, s.alpha * new_front);
        const float* v = v_color + b * 16 * channels + part * VW;
        vf dot = vset(0.0f);
        if (CH) {
#pragma GCC unroll 8
          for (int k = 0; k < CH; ++k) {
            const vf v_k = vload(v + 16 * k);
            dot = vfma(vset(record[kRecordHeader + k]), v_k, dot);
            sum[k] = vfma(weight, v_k, sum[k]);
          }
        } else {
          for (int k = 0; k < channels; ++k) {
            const vf v_k = vload(v + 16 * k);
            dot = vfma(vset(record[kRecordHeader + k]), v_k, dot);
            vstoreu(dynamic + k * VW, vfma(weight, v_k, vloadu(dynamic + k * VW)));
          }
        }
        const vf light_behind = vload(behind + lane);
        const vf v_alpha = vfnma(inverse, light_behind, new_front * dot);
        vstore(behind + lane, vfma(weight, dot, light_behind));
        // no gradient through a clamped alpha
        const vf g = vzero(vand(lit, vge(vset(kAlphaMax), s.raw)), s.raw * v_alpha);
        const vf ge = g * s.e, gh = g * s.h;
        sum[G + 0] = sum[G + 0] + ge;
        sum[G + 1] = sum[G + 1] + gh;
        if (ABS) {
          sum[G + 2] = sum[G + 2] + vabs(ge);
          sum[G + 3] = sum[G + 3] + vabs(vfma(vset(record[kEy]), ge, vset(record[kHy]) * gh));
        }
        sum[G + 4] = vfma(ge, s.e, sum[G + 4]);
        sum[G + 5] = vfma(ge, s.h, sum[G + 5]);
        sum[G + 6] = vfma(gh, s.h, sum[G + 6]);
        sum[G + 7] = sum[G + 7] + g;
      }
    }
    if (CH) {
      reduce16(sum, slot);
    } else {
      alignas(64) float geometry[16];
      reduce16(sum, geometry);
      for (int k = 0; k < channels; ++k) {
        float total = 0.0f;
        for (int l = 0; l < VW; ++l) total += dynamic[k * VW + l];
        slot[k] = total;
      }
      for (int k = 0; k < kSlotGeometry; ++k) slot[channels + k] = geometry[k];
    }
  }
}

// Set by any task, read after all of them.
struct Failure {
  int happened = 0;
  void set() { __atomic_store_n(&happened, 1, __ATOMIC_RELAXED); }
  int status() const { return happened ? NSE_OUT_OF_MEMORY : 0; }
};

template <int CH>
int forward_tiles(const NseRasterArgs& a, Frame& f, int64_t tiles) {
  Failure failure;
  auto body = [&](int64_t task) {
    if (CH) {
      alignas(64) float color[kTilePixels * (CH ? CH : 1)];
      forward_tile<CH>(a, f, task, color);
    } else {
      float* color = static_cast<float*>(aligned_alloc(64, sizeof(float) * kTilePixels * a.channels));
      if (!color) return failure.set();
      forward_tile<CH>(a, f, task, color);
      free(color);
    }
  };
  parallel(a.threads, tiles, body);
  return failure.status();
}

template <int CH, bool ABS>
int backward_tiles(const NseRasterArgs& a, Frame& f, int64_t tiles, float* background_sums) {
  Failure failure;
  auto body = [&](int64_t task) {
    float* sums = background_sums ? background_sums + task * a.channels : nullptr;
    if (CH) {
      alignas(64) float state[kTilePixels * ((CH ? CH : 1) + 2)];
      backward_tile<CH, ABS>(a, f, task, state, sums);
    } else {
      float* state = static_cast<float*>(aligned_alloc(64, sizeof(float) * (kTilePixels * (a.channels + 2) + 16 * a.channels)));
      if (!state) return failure.set();
      backward_tile<CH, ABS>(a, f, task, state, sums);
      free(state);
    }
  };
  parallel(a.threads, tiles, body);
  return failure.status();
}

int raster_forward(const NseRasterArgs* args) {
  const NseRasterArgs& a = *args;
  Frame& f = *static_cast<Frame*>(a.frame);
  f.width = a.width, f.height = a.height;
  f.tiles_x = ceil_div(a.width, kTile), f.tiles_y = ceil_div(a.height, kTile);
  const int64_t tiles = a.cameras * f.tiles_x * f.tiles_y;
  const double t0 = nse_now();
  int status = bin(a, f);
  if (status) return status;
  RESERVE(float, transmittance, f.transmittance, tiles * kTilePixels);
  RESERVE(int32_t, last, f.last, tiles * kTilePixels);
  (void)transmittance, (void)last;
  const double t1 = nse_now();
  switch (a.channels) {
    case 1: status = forward_tiles<1>(a, f, tiles); break;
    case 3: status = forward_tiles<3>(a, f, tiles); break;
    case 4: status = forward_tiles<4>(a, f, tiles); break;
    case 5: status = forward_tiles<5>(a, f, tiles); break;
    case 6: status = forward_tiles<6>(a, f, tiles); break;
    case 7: status = forward_tiles<7>(a, f, tiles); break;
    case 8: status = forward_tiles<8>(a, f, tiles); break;
    default: status = forward_tiles<0>(a, f, tiles);
  }
  f.seconds[kTimeBin] = t1 - t0;
  f.seconds[kTimeForward] = nse_now() - t1;
  return status;
}

int raster_backward(const NseRasterArgs* args) {
  const NseRasterArgs& a = *args;
  Frame& f = *static_cast<Frame*>(a.frame);
  const int channels = a.channels;
  const int64_t tiles_per_camera = f.tiles_x * f.tiles_y, tiles = a.cameras * tiles_per_camera;
  f.slot_stride = (channels + kSlotGeometry + 15) / 16 * 16;
  RESERVE(float, slots, f.scratch[6], f.intersections * f.slot_stride);
  float* background_sums = nullptr;
  if (a.v_backgrounds) {
    RESERVE(float, sums, f.scratch[7], tiles * channels);
    background_sums = sums;
  }
  const double t0 = nse_now();
  int status = 0;
#define NSE_CASE(n)                                                            \
  case n:                                                                      \
    if (a.v_means2d_abs)                                                       \
      status = backward_tiles<n, true>(a, f, tiles, background_sums);          \
    else                                                                       \
      status = backward_tiles<n, false>(a, f, tiles, background_sums);         \
    break;
  switch (channels) {
    NSE_CASE(1) NSE_CASE(3) NSE_CASE(4) NSE_CASE(5) NSE_CASE(6) NSE_CASE(7) NSE_CASE(8)
    default: status = backward_tiles<0, true>(a, f, tiles, background_sums);
  }
#undef NSE_CASE
  if (status) return status;
  const double t1 = nse_now();

  const int64_t total = a.cameras * a.gaussians, tasks = ceil_div(total, kGaussiansPerTask);
  const int32_t* rank = static_cast<const int32_t*>(f.rank.data);
  const uint32_t* slot_base = static_cast<const uint32_t*>(f.slot_base.data);
  const uint8_t* slot_used = static_cast<const uint8_t*>(f.slot_used.data);
  const float* records = static_cast<const float*>(f.records.data);
  const int64_t stride = f.slot_stride;
  auto reduce = [&](int64_t task) {
    const int64_t end = min64(total, (task + 1) * kGaussiansPerTask);
    for (int64_t g = task * kGaussiansPerTask; g < end; ++g) {
      float* v_feature = a.v_features + g * channels;
      float geometry[kSlotGeometry] = {0};
      bool used = false;
      for (int k = 0; k < channels; ++k) v_feature[k] = 0.0f;
      if (rank[g] >= 0)
        for (uint32_t slot = slot_base[rank[g]]; slot < slot_base[rank[g] + 1]; ++slot)
          if (slot_used[slot]) {
            used = true;
            const float* from = slots + slot * stride;
            for (int k = 0; k < channels; ++k) v_feature[k] += from[k];
            for (int k = 0; k < kSlotGeometry; ++k) geometry[k] += from[channels + k];
          }
      float ex = 0.0f, ey = 0.0f, hy = 0.0f, inverse_ex = 0.0f, inverse_hy = 0.0f, slope = 0.0f;
      if (used) {
        const float* record = records + rank[g] * f.record_stride;
        ex = record[kEx], ey = record[kEy], hy = record[kHy], slope = record[kSlope];
        inverse_ex = 1.0f / ex, inverse_hy = 1.0f / hy;
      }
      constexpr float kScale = 2.0f / kLog2e;  // the form holds log2(e)
      a.v_means2d[2 * g] = -kScale * ex * geometry[0];
      a.v_means2d[2 * g + 1] = -kScale * (ey * geometry[0] + hy * geometry[1]);
      if (a.v_means2d_abs) {
        a.v_means2d_abs[2 * g] = kScale * ex * geometry[2];
        a.v_means2d_abs[2 * g + 1] = kScale * geometry[3];
      }
      // dy = h / hy, dx = e / ex - slope dy
      const float dy_dy = geometry[6] * inverse_hy * inverse_hy, e_dy = geometry[5] * inverse_ex * inverse_hy;
      const float dx_dy = e_dy - slope * dy_dy, dx_dx = geometry[4] * inverse_ex * inverse_ex - slope * (e_dy + dx_dy);
      a.v_conics[3 * g] = -0.5f * dx_dx;
      a.v_conics[3 * g + 1] = -dx_dy;
      a.v_conics[3 * g + 2] = -0.5f * dy_dy;
      a.v_opacities[g] = geometry[7] != 0.0f ? geometry[7] / a.opacities[g] : 0.0f;
    }
  };
  parallel(a.threads, tasks, reduce);
  if (a.v_backgrounds)
    for (int64_t c = 0; c < a.cameras; ++c)
      for (int k = 0; k < channels; ++k) {
        double sum = 0.0;
        for (int64_t t = c * tiles_per_camera; t < (c + 1) * tiles_per_camera; ++t) sum += background_sums[t * channels + k];
        a.v_backgrounds[c * channels + k] = (float)sum;
      }
  f.seconds[kTimeBackward] = t1 - t0;
  f.seconds[kTimeReduce] = nse_now() - t1;
  return 0;
}

// ----------------------------------------------------------------------------------------------- measurements

// After raster_forward: pairs of pixel and Gaussian that were blended, and the lanes of the blocks that hold them.
void count_blended(const Frame* frame, int64_t cameras, int64_t* blended, int64_t* lanes) {
  const Frame& f = *frame;
  const uint32_t* isect_rank = static_cast<const uint32_t*>(f.isect_rank.data);
  const uint16_t* isect_mask = static_cast<const uint16_t*>(f.isect_mask.data);
  const float* records = static_cast<const float*>(f.records.data);
  *blended = *lanes = 0;
  for (int64_t task = 0; task < cameras * f.tiles_x * f.tiles_y; ++task) {
    const Tile t = find_tile(f, task);
    const int32_t* last = static_cast<const int32_t*>(f.last.data) + t.state;
    for (int64_t i = t.begin; i < t.end; ++i) {
      const float* record = records + isect_rank[i] * f.record_stride;
      float e0, h0;
      form_at_tile(record, t, &e0, &h0);
      for (uint32_t bits = isect_mask[i]; bits; bits &= bits - 1) {
        const int b = __builtin_ctz(bits);
        *lanes += 16;
        for (int part = 0; part < kParts; ++part) {
          const vf u = vload(kCentreX + b % 4 * 16 + part * VW), v = vload(kCentreY + b / 4 * 16 + part * VW);
          const vm hit = splat_at(record, vset(e0), vset(h0), u, v).hit;
          const vm open_lanes = vige(viload(last + b * 16 + part * VW), viset((int32_t)(i - t.begin)));
          *blended += __builtin_popcount(vbits(vand(hit, open_lanes)));
        }
      }
    }
  }
}

// Seconds of one fused multiply-add of VW lanes when nothing waits for anything: the vector rate of this machine.
double vector_seconds() {
  constexpr int kChains = 12, kRounds = 200000;
  const vf factor = vset(0.999f), addend = vset(1e-3f);
  double best = 1e30;
  for (int attempt = 0; attempt < 8; ++attempt) {
    vf chain[kChains];
    for (int i = 0; i < kChains; ++i) chain[i] = vset((float)i);
    const double start = nse_now();
    for (int round = 0; round < kRounds; ++round) {
#pragma GCC unroll 12
      for (int i = 0; i < kChains; ++i) chain[i] = vfma(chain[i], factor, addend);
    }
    const double seconds = nse_now() - start;
    vf sum = chain[0];
    for (int i = 1; i < kChains; ++i) sum = sum + chain[i];
    volatile float used = lane_sum(sum);  // or the loop would be left out
    (void)used;
    if (seconds < best) best = seconds;
  }
  return best / ((double)kChains * kRounds);
}

// ------------------------------------------------------------------------------------------------------ SSIM

constexpr int kTaps = 11, kHalo = kTaps - 1;
constexpr int kRowsPerTask = 8;

void gaussian_window(float* w) {  // sigma 1.5, rounded step by step as pytorch_msssim does in float32
  float sum = 0.0f;
  for (int i = 0; i < kTaps; ++i) sum += w[i] = expf(-(float)((i - 5) * (i - 5)) / 4.5f);
  for (int i = 0; i < kTaps; ++i) w[i] /= sum;
}

struct Plane {
  const float* data;
  int64_t row, column;
};

Plane plane_of(const float* data, const int64_t* strides, int64_t channels, int64_t index) {
  return {data + index / channels * strides[0] + index % channels * strides[1], strides[2], strides[3]};
}

// The row itself if it is contiguous, else a copy in `buffer`.
const float* contiguous_row(const Plane& p, int64_t y, int64_t width, float* buffer) {
  const float* from = p.data + y * p.row;
  if (p.column == 1) return from;
  for (int64_t x = 0; x < width; ++x) buffer[x] = from[x * p.column];
  return buffer;
}

int ssim_forward(const NseSsimArgs* args) {
  const NseSsimArgs& a = *args;
  const int64_t out_h = a.height - kHalo, out_w = a.width - kHalo, planes = a.batch * a.channels;
  const int64_t strips = ceil_div(out_h, kRowsPerTask), tasks = planes * strips;
  double* sums = static_cast<double*>(calloc(tasks, sizeof(double)));
  if (!sums) return NSE_OUT_OF_MEMORY;
  float w[kTaps];
  gaussian_window(w);
  Failure failure;
  auto body = [&](int64_t task) {
    const int64_t plane = task / strips, y0 = task % strips * kRowsPerTask, y1 = min64(out_h, y0 + kRowsPerTask);
    const int64_t width = a.width, padded = (width + 31) / 16 * 16;
    const Plane px = plane_of(a.pred, a.pred_strides, a.channels, plane), py = plane_of(a.target, a.target_strides, a.channels, plane);
    float* memory = static_cast<float*>(aligned_alloc(64, sizeof(float) * padded * (2 * (kRowsPerTask + kHalo) + 10)));
    if (!memory) return failure.set();
    const float *rows_x[kRowsPerTask + kHalo], *rows_y[kRowsPerTask + kHalo];
    for (int64_t r = y0; r < y1 + kHalo; ++r) {
      rows_x[r - y0] = contiguous_row(px, r, width, memory + 2 * (r - y0) * padded);
      rows_y[r - y0] = contiguous_row(py, r, width, memory + (2 * (r - y0) + 1) * padded);
    }
    float* column = memory + 2 * (kRowsPerTask + kHalo) * padded;  // vertically blurred x, y, xx, yy, xy
    float* blurred = column + 5 * padded;
    const float c1 = 0.01f * 0.01f, c2 = 0.03f * 0.03f;
    double total = 0.0;
    for (int64_t y = y0; y < y1; ++y) {
      float *bx = column, *by = bx + padded, *bxx = by + padded, *byy = bxx + padded, *bxy = byy + padded;
      for (int64_t i = 0; i < width; i += VW) {
        vf sx = vset(0.0f), sy = sx, sxx = sx, syy = sx, sxy = sx;
        const int64_t at = i + VW <= width ? i : (width >= VW ? width - VW : 0);
        if (width >= VW) {
          for (int k = 0; k < kTaps; ++k) {
            const vf x = vloadu(rows_x[y - y0 + k] + at), v = vloadu(rows_y[y - y0 + k] + at), wk = vset(w[k]);
            const vf wx = wk * x, wy = wk * v;
            sx = sx + wx, sy = sy + wy;
            sxx = vfma(wx, x, sxx), syy = vfma(wy, v, syy), sxy = vfma(wx, v, sxy);
          }
          vstoreu(bx + at, sx), vstoreu(by + at, sy), vstoreu(bxx + at, sxx), vstoreu(byy + at, syy), vstoreu(bxy + at, sxy);
        } else {
          for (int64_t x = 0; x < width; ++x) {
            float s[5] = {0};
            for (int k = 0; k < kTaps; ++k) {
              const float u = rows_x[y - y0 + k][x], v = rows_y[y - y0 + k][x];
              s[0] += w[k] * u, s[1] += w[k] * v, s[2] += w[k] * u * u, s[3] += w[k] * v * v, s[4] += w[k] * u * v;
            }
            bx[x] = s[0], by[x] = s[1], bxx[x] = s[2], byy[x] = s[3], bxy[x] = s[4];
          }
        }
      }
      for (int map = 0; map < 5; ++map) {
        const float* from = column + map * padded;
        float* to = blurred + map * padded;
        for (int64_t x = 0; x < out_w; ++x) to[x] = w[0] * from[x];
        for (int64_t x = 0; x < out_w; ++x) {
          float s = to[x];
          for (int k = 1; k < kTaps; ++k) s += w[k] * from[x + k];
          to[x] = s;
        }
      }
      const float *mx = blurred, *my = mx + padded, *exx = my + padded, *eyy = exx + padded, *exy = eyy + padded;
      float* d = a.derivatives ? a.derivatives + (plane * out_h + y) * out_w : nullptr;
      const int64_t map_size = planes * out_h * out_w;
      float row_sum[16] = {0};
      for (int64_t x0 = 0; x0 < out_w; x0 += 16) {
        const int64_t n = min64(16, out_w - x0);
        for (int64_t l = 0; l < n; ++l) {
          const int64_t x = x0 + l;
          const float m1 = mx[x], m2 = my[x];
          const float s11 = exx[x] - m1 * m1, s22 = eyy[x] - m2 * m2, s12 = exy[x] - m1 * m2;
          const float a1 = 2.0f * m1 * m2 + c1, a2 = 2.0f * s12 + c2, b1 = m1 * m1 + m2 * m2 + c1, b2 = s11 + s22 + c2;
          const float inverse = 1.0f / (b1 * b2), ssim = a1 * a2 * inverse;
          row_sum[l] += ssim;
          if (d) {
            const float d_s12 = 2.0f * a1 * inverse, d_s11 = -ssim / b2;
            d[x] = 2.0f * m2 * a2 * inverse - 2.0f * m1 * ssim / b1 - 2.0f * m1 * d_s11 - m2 * d_s12;
            d[map_size + x] = d_s11;
            d[2 * map_size + x] = d_s12;
          }
        }
      }
      for (int l = 0; l < 16; ++l) total += row_sum[l];
    }
    sums[task] = total;
    free(memory);
  };
  parallel(a.threads, tasks, body);
  double total = 0.0;
  for (int64_t t = 0; t < tasks; ++t) total += sums[t];
  free(sums);
  *a.mean = total / (double)(planes * out_h * out_w);
  return failure.status();
}

int ssim_backward(const NseSsimArgs* args) {
  const NseSsimArgs& a = *args;
  const int64_t out_h = a.height - kHalo, out_w = a.width - kHalo, planes = a.batch * a.channels;
  const int64_t strips = ceil_div(a.height, kRowsPerTask);
  float w[kTaps];
  gaussian_window(w);
  const float scale = a.scale / (float)(planes * out_h * out_w);
  Failure failure;
  auto body = [&](int64_t task) {
    const int64_t plane = task / strips, y0 = task % strips * kRowsPerTask, y1 = min64(a.height, y0 + kRowsPerTask);
    const int64_t width = a.width, padded = (width + 2 * kHalo + 31) / 16 * 16;
    float* memory = static_cast<float*>(aligned_alloc(64, sizeof(float) * padded * 8));
    if (!memory) return failure.set();
    memset(memory, 0, sizeof(float) * padded * 8);
    float *gradient = memory + 3 * padded, *buffer_x = memory + 6 * padded, *buffer_y = memory + 7 * padded;
    const Plane px = plane_of(a.pred, a.pred_strides, a.channels, plane), py = plane_of(a.target, a.target_strides, a.channels, plane);
    float* out_plane = a.grad + plane / a.channels * a.grad_strides[0] + plane % a.channels * a.grad_strides[1];
    for (int64_t y = y0; y < y1; ++y) {
      for (int map = 0; map < 3; ++map) {
        const float* d = a.derivatives + (map * planes + plane) * out_h * out_w;
        float* column = memory + map * padded + kHalo;  // zeros on both sides
        for (int64_t x = 0; x < out_w; ++x) column[x] = 0.0f;
        for (int k = 0; k < kTaps; ++k) {
          const int64_t row = y - k;
          if (row < 0 || row >= out_h) continue;
          const float* from = d + row * out_w;
          for (int64_t x = 0; x < out_w; ++x) column[x] += w[k] * from[x];
        }
        float* to = gradient + map * padded;
        for (int64_t x = 0; x < width; ++x) {
          float s = 0.0f;
          for (int k = 0; k < kTaps; ++k) s += w[k] * column[x - k];
          to[x] = s;
        }
      }
      const float *x_row = contiguous_row(px, y, width, buffer_x), *y_row = contiguous_row(py, y, width, buffer_y);
      const float *g0 = gradient, *g1 = g0 + padded, *g2 = g1 + padded;
      float* out = out_plane + y * a.grad_strides[2];
      const int64_t step = a.grad_strides[3];
      for (int64_t x = 0; x < width; ++x) out[x * step] = scale * (g0[x] + 2.0f * x_row[x] * g1[x] + y_row[x] * g2[x]);
    }
    free(memory);
  };
  parallel(a.threads, planes * strips, body);
  return failure.status();
}

// ---------------------------------------------------------------------------------------------------- patches

// Where along a side of a picture grid_sample reads (border padding, align_corners=False). NaN: at the first pixel.
NSE_INLINE vf pixel_at(vf place, int64_t size) {
  const float half = 0.5f * (float)size;
  return vmin(vmax(vfma(place, vset(half), vset(half - 0.5f)), vset(0.0f)), vset((float)(size - 1)));
}

constexpr float kUnseen = 2.0f;  // larger than any cost

// Cost in one source of VW pixels from `at` on; kUnseen where it does not see the whole patch.
vf patch_cost_in(const NsePatchArgs& a, const NsePatchSource& source, int64_t at) {
  const float* planes = a.planes + at;
  const vf inverse = vloadu(planes), along_u = vloadu(planes + a.pixels), along_v = vloadu(planes + 2 * a.pixels);
  const float* base = source.base + at;
  const vf base_x = vloadu(base), base_y = vloadu(base + a.pixels), base_z = vloadu(base + 2 * a.pixels);
  const vf ex = vset(source.epipole[0]), ey = vset(source.epipole[1]), ez = vset(source.epipole[2]), small = vset(1e-6f);
  const vi stride = viset((int32_t)source.width + 1);
  vf mean = vset(0.0f), square = mean, product = mean, nearest = vset(INFINITY), outside = mean;
  for (int32_t s = 0; s < a.samples; ++s) {
    const float *moves = source.moves + s, *weights = a.weights + s * a.pixels + at, *view = a.view + s * a.pixels + at;
    const vf w = vfma(along_u, vset(a.offsets[s]), vfma(along_v, vset(a.offsets[a.samples + s]), inverse));
    const vf z = vfma(ez, w, base_z + vset(moves[2 * a.samples]));
    const vf over = vset(1.0f) / vmax(z, small);
    const vf x = vfma(ex, w, base_x + vset(moves[0])) * over, y = vfma(ey, w, base_y + vset(moves[a.samples])) * over;
    nearest = vmin(z, nearest);
    if (s == a.samples / 2) outside = vmax(vabs(x), vabs(y));
    const vf column = pixel_at(x, source.width), row = pixel_at(y, source.height);
    const vi left = vtrunc(column), upper = vtrunc(row), place = viadd(vimul(upper, stride), left);
    const vf right_share = column - vfloat(left), lower_share = row - vfloat(upper);
    const vi here = vgather(source.pairs, place), right = vgather(source.pairs, viadd(place, viset(1)));
    const vf a0 = vfloat(vlow16(here)), b0 = vfloat(vhigh16(here));
    const vf above = vfma(right_share, vfloat(vlow16(right)) - a0, a0), below = vfma(right_share, vfloat(vhigh16(right)) - b0, b0);
    const vf grey = vfma(lower_share, below - above, above) * vset(1.0f / 65535.0f), weighted = vloadu(weights) * grey;
    mean = mean + weighted;
    square = vfma(weighted, grey, square);
    product = vfma(weighted, vloadu(view), product);
  }
  const vf zero = vset(0.0f), floor = vset(a.floor), one = vset(1.0f);
  const vf variance = vmax(vfnma(mean, mean, square), zero) + floor, own = vmax(vloadu(a.variance + at), zero) + floor;
  const vf correlation = vfnma(mean, vloadu(a.mean + at), product) / vsqrt(variance * own);
  const vm seen = vand(vge(one, outside), vgt(nearest, small));
  return vsel(seen, (one - correlation) * vset(0.5f), vset(kUnseen));
}

int patch_cost(const NsePatchArgs* args) {
  const NsePatchArgs& a = *args;
  const int64_t per_task = 64 * VW, tasks = a.pixels < per_task ? 1 : a.pixels / per_task;
  auto body = [&](int64_t task) {
    const int64_t end = task == tasks - 1 ? a.pixels : (task + 1) * per_task;
    for (int64_t i = task * per_task; i < end; i += VW) {
      const int64_t at = min64(i, a.pixels - VW);  // the last vector begins earlier and computes some pixels twice
      const vf unseen = vset(kUnseen), one = vset(1.0f), half = vset(0.5f);
      vf first = unseen, second = unseen, count = vset(0.0f);
      for (int32_t n = 0; n < a.sources; ++n) {
        const vf cost = patch_cost_in(a, a.source[n], at);
        second = vmin(second, vmax(first, cost));
        first = vmin(first, cost);
        count = count + vzero(vgt(unseen, cost), one);
      }
      const vf best = vsel(vge(count, vset(3.0f)), (first + second) * half, first);
      vstoreu(a.cost + at, vsel(vge(count, one), best, half));
    }
  };
  parallel(a.threads, tasks, body);
  return 0;
}

}  // namespace

extern "C" const KernelTable NSE_TABLE = {
    NSE_TABLE_NAME, project_forward, project_backward, raster_forward, raster_backward, ssim_forward, ssim_backward, patch_cost, count_blended, vector_seconds, VW,
};
