// Calls the rasteriser with random, extreme and broken inputs: `fuzz CALLS SEED INSTRUCTION_SET`. Built by ../fuzz.py, also
// with sanitizers. Every buffer has exactly the promised size. Prints the counts; the first violation ends it with status 1.
//
// What must hold: no crash and no access outside; NaN and infinity are reported with the right bit; opacity lies in
// [0, 1], matching costs are finite; ordinary inputs give finite images and gradients; the number of threads changes no bit.
//
// `fuzz CALLS SEED INSTRUCTION_SET FILE` calls it with ordinary inputs only and writes what comes out, so that builds can be
// compared: for each array its length (int64) and its values (float32), in the byte order of the machine.

#include "interface.h"

#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

extern "C" {
int nse_select_isa(const char* name);
int nse_project_forward(const NseProjectArgs*);
int nse_project_backward(const NseProjectArgs*);
int nse_raster_forward(const NseRasterArgs*);
int nse_raster_backward(const NseRasterArgs*);
int nse_ssim_forward(const NseSsimArgs*);
int nse_ssim_backward(const NseSsimArgs*);
int nse_patch_cost(const NsePatchArgs*);
void* nse_frame_acquire();
void nse_frame_release(void*);
int64_t nse_frame_intersections(const void*);
void nse_frame_lists(const void*, int64_t, int64_t, int32_t, const float*, int32_t*, int64_t*, int32_t*, int32_t*);
void nse_frame_blended(const void*, int64_t, int64_t*);
}

namespace {

struct Random {
  uint64_t state;
  uint64_t next() {  // splitmix64
    uint64_t z = (state += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  int below(int n) { return (int)(next() % (uint64_t)n); }
  bool one_in(int n) { return below(n) == 0; }
  float uniform() { return (float)(next() >> 40) * 0x1p-24f; }
  float normal() {  // sum of uniforms: near enough
    float sum = -2.0f;
    for (int i = 0; i < 4; ++i) sum += uniform();
    return 1.7f * sum;
  }
  template <size_t N>
  float pick(const float (&values)[N]) { return values[below((int)N)]; }
  template <size_t N>
  int pick(const int (&values)[N]) { return values[below((int)N)]; }
};

// Exactly n floats, so that a sanitizer sees the first access behind them.
typedef std::vector<float> Floats;

const float kExtreme[] = {0.0f,    -0.0f,  1e-45f, 1e-38f, -1e-30f, 1e-10f,   1e-4f, 1.0f,
                          -1.0f,   1e4f,   -1e4f,  1e10f,  1e20f,   -1e30f,   1e38f, FLT_MAX};
const float kBroken[] = {NAN, INFINITY, -INFINITY};

[[noreturn]] void violation(uint64_t call, const char* what) {
  std::printf("violation in call %llu: %s\n", (unsigned long long)call, what);
  std::exit(1);
}

bool all_finite(const Floats& values) {
  for (float v : values)
    if (!std::isfinite(v)) return false;
  return true;
}

struct Scene {
  int64_t cameras, gaussians;
  int width, height, sh_degree, color_stride, color_channels, extra_channels, with_depth, antialiased, per_camera;
  float near_plane, far_plane, radius_clip, eps2d;
  Floats means, quats, scales, opacities, colors, extra, viewmats, centres, intrinsics, backgrounds;
  int broken;   // NSE_BAD_* bits of the inputs that hold NaN or infinity
  bool ordinary;
  int channels() const { return color_channels + extra_channels + with_depth; }
};

Floats fill(Random& r, int64_t n, float scale, bool extreme) {
  Floats out((size_t)n);
  for (float& v : out) v = extreme && r.one_in(4) ? r.pick(kExtreme) : scale * r.normal();
  return out;
}

void look_from(Random& r, Scene& s) {
  s.viewmats.assign((size_t)(16 * s.cameras), 0.0f);
  s.centres.assign((size_t)(3 * s.cameras), 0.0f);
  s.intrinsics.assign((size_t)(9 * s.cameras), 0.0f);
  for (int64_t c = 0; c < s.cameras; ++c) {
    float* view = &s.viewmats[(size_t)(16 * c)];
    const float angle = 0.3f * r.normal();
    view[0] = view[10] = std::cos(angle), view[2] = std::sin(angle), view[8] = -view[2], view[5] = view[15] = 1.0f;
    for (int i = 0; i < 3; ++i) view[4 * i + 3] = 0.3f * r.normal();
    for (int i = 0; i < 3; ++i)
      for (int j = 0; j < 3; ++j) s.centres[(size_t)(3 * c + i)] -= view[4 * j + i] * view[4 * j + 3];
    float* k = &s.intrinsics[(size_t)(9 * c)];
    const float focal = s.ordinary ? 20.0f + 40.0f * r.uniform() : r.pick({1e-3f, 1.0f, 30.0f, 1e5f});
    k[0] = k[4] = focal, k[2] = 0.5f * (float)s.width, k[5] = 0.5f * (float)s.height, k[8] = 1.0f;
  }
}

Scene draw_scene(Random& r, bool ordinary) {
  Scene s;
  s.ordinary = ordinary;
  const bool wild = !s.ordinary;
  s.cameras = r.pick({1, 1, 1, 2, 3});
  s.gaussians = r.pick({0, 1, 2, 3, 7, 16, 17, 33, 60});
  s.width = r.pick({1, 2, 5, 15, 16, 17, 31, 33}), s.height = r.pick({1, 2, 5, 15, 16, 17, 31, 33});
  s.sh_degree = r.below(5) - 1;
  const int bases = (s.sh_degree + 1) * (s.sh_degree + 1) + r.below(2);
  s.color_channels = s.sh_degree >= 0 ? 3 : r.pick({0, 1, 2, 3, 4, 9, 20});
  s.color_stride = s.sh_degree >= 0 ? 3 * bases : s.color_channels;
  s.extra_channels = r.pick({0, 0, 1, 3, 4});
  s.with_depth = s.color_channels + s.extra_channels == 0 || r.one_in(2);
  s.antialiased = r.below(2), s.per_camera = r.below(2);
  s.near_plane = wild ? r.pick({-1.0f, 0.0f, 0.01f, 1e10f}) : 0.01f;
  s.far_plane = wild ? r.pick({0.0f, 2.0f, 1e10f, INFINITY}) : 1e10f;
  s.radius_clip = wild ? r.pick({-1.0f, 0.0f, 5.0f, INFINITY}) : 0.0f;
  s.eps2d = wild ? r.pick({0.0f, 1e-6f, 0.3f, 1e4f}) : 0.3f;
  const int64_t n = s.gaussians;
  s.means = fill(r, 3 * n, 1.0f, wild);
  for (int64_t i = 0; i < n; ++i)
    if (!wild || r.one_in(2)) s.means[(size_t)(3 * i + 2)] += 2.5f;
  s.quats = fill(r, 4 * n, 1.0f, wild);
  s.scales = fill(r, 3 * n, 0.0f, wild);
  for (float& v : s.scales)
    if (!wild || r.one_in(2)) v = std::exp(0.7f * r.normal() - 2.0f);
  s.opacities = fill(r, n, 0.0f, wild && r.one_in(4));
  for (float& v : s.opacities) v = r.one_in(4) ? r.pick({0.0f, 1.0f, 1.0f / 255.0f, 0.999f}) : v + r.uniform();
  s.colors = fill(r, (int64_t)s.color_stride * n * (s.per_camera ? s.cameras : 1), 0.4f, wild && r.one_in(4));
  s.extra = fill(r, s.extra_channels * n, 0.4f, wild && r.one_in(4));
  s.backgrounds = fill(r, r.below(2) * s.cameras * s.channels(), 0.4f, false);
  look_from(r, s);
  s.broken = 0;
  if (wild && n && r.one_in(8)) {
    struct Target { Floats* values; int bit; } targets[] = {
        {&s.means, NSE_BAD_MEANS}, {&s.quats, NSE_BAD_QUATS}, {&s.scales, NSE_BAD_SCALES}, {&s.opacities, NSE_BAD_OPACITIES}};
    const Target t = targets[r.below(4)];
    (*t.values)[(size_t)r.below((int)t.values->size())] = r.pick(kBroken);
    s.broken = t.bit;
  }
  return s;
}

struct Result {
  Floats render, alpha, v_means, v_quats, v_scales, v_opacities, v_colors, v_extra, v_viewmats, v_backgrounds, v_abs;
};

float* data_or_null(Floats& values) { return values.empty() ? nullptr : values.data(); }

// Forward and backward pass as native_ops.py runs them. `seed` fixes the gradient that comes in.
int run(uint64_t call, const Scene& s, int threads, uint64_t seed, Result& out) {
  const int64_t n = s.gaussians, total = s.cameras * n, pixels = s.cameras * s.width * s.height;
  const int channels = s.channels();
  Floats means2d((size_t)(2 * total)), depths((size_t)total), conics((size_t)(3 * total)), compensations((size_t)total);
  Floats opacities2d((size_t)total), features((size_t)(channels * total));
  std::vector<int32_t> radii((size_t)total);
  NseProjectArgs p = {};
  p.cameras = s.cameras, p.gaussians = n, p.width = s.width, p.height = s.height;
  p.sh_degree = s.sh_degree, p.color_stride = s.color_stride, p.color_channels = s.color_channels;
  p.extra_channels = s.extra_channels, p.with_depth = s.with_depth, p.antialiased = s.antialiased;
  p.colors_per_camera = s.per_camera, p.threads = threads;
  p.near_plane = s.near_plane, p.far_plane = s.far_plane, p.radius_clip = s.radius_clip, p.eps2d = s.eps2d;
  p.means = s.means.data(), p.quats = s.quats.data(), p.scales = s.scales.data(), p.opacities = s.opacities.data();
  p.colors = s.color_channels ? s.colors.data() : nullptr, p.extra = s.extra_channels ? s.extra.data() : nullptr;
  p.viewmats = s.viewmats.data(), p.camera_centres = s.centres.data(), p.intrinsics = s.intrinsics.data();
  p.radii = radii.data(), p.means2d = means2d.data(), p.depths = depths.data(), p.conics = conics.data();
  p.compensations = s.antialiased ? compensations.data() : nullptr, p.opacities2d = opacities2d.data(), p.features = features.data();
  int status = nse_project_forward(&p);
  if (status) return status;

  NseRasterArgs a = {};
  a.cameras = s.cameras, a.gaussians = n, a.width = s.width, a.height = s.height, a.channels = channels;
  a.normalise_last = s.with_depth, a.threads = threads, a.frame = nse_frame_acquire();
  a.means2d = means2d.data(), a.conics = conics.data(), a.opacities = opacities2d.data(), a.features = features.data();
  a.backgrounds = s.backgrounds.empty() ? nullptr : s.backgrounds.data(), a.depths = depths.data(), a.radii = radii.data();
  out.render.resize((size_t)(pixels * channels)), out.alpha.resize((size_t)pixels);
  a.render = out.render.data(), a.alpha = out.alpha.data();
  status = nse_raster_forward(&a);
  if (status) violation(call, "the forward pass reports an error");
  const int64_t intersections = nse_frame_intersections(a.frame);
  const int64_t tiles = s.cameras * ((s.width + 15) / 16) * ((s.height + 15) / 16);
  std::vector<int32_t> per_gaussian((size_t)total), ids((size_t)intersections), offsets((size_t)tiles);
  std::vector<int64_t> keys((size_t)intersections);
  nse_frame_lists(a.frame, s.cameras, n, threads, depths.data(), per_gaussian.data(), keys.data(), ids.data(), offsets.data());
  for (int64_t i = 1; i < intersections; ++i)
    if (keys[(size_t)i] < keys[(size_t)(i - 1)]) violation(call, "intersections are not sorted");
  int64_t blended[2];
  nse_frame_blended(a.frame, s.cameras, blended);
  if (blended[0] < 0 || blended[0] > blended[1]) violation(call, "more pairs than lanes");

  Random r = {seed};
  const Floats v_render = fill(r, pixels * channels, 1.0f, !s.ordinary && r.one_in(4)), v_alpha = fill(r, pixels, 1.0f, false);
  const bool absolute = r.one_in(2), only_alpha = r.one_in(8);
  Floats v_means2d((size_t)(2 * total)), v_conics((size_t)(3 * total)), v_opacities2d((size_t)total), v_features((size_t)(channels * total));
  out.v_abs.resize(absolute ? (size_t)(2 * total) : 0), out.v_backgrounds.resize(s.backgrounds.size());
  a.v_render = only_alpha ? nullptr : v_render.data(), a.v_alpha = v_alpha.data();
  a.v_means2d = v_means2d.data(), a.v_means2d_abs = absolute && total ? out.v_abs.data() : nullptr, a.v_conics = v_conics.data();
  a.v_opacities = v_opacities2d.data(), a.v_features = v_features.data(), a.v_backgrounds = data_or_null(out.v_backgrounds);
  status = nse_raster_backward(&a);
  nse_frame_release(a.frame);
  if (status) violation(call, "the backward pass reports an error");

  out.v_means.resize((size_t)(3 * n)), out.v_quats.resize((size_t)(4 * n)), out.v_scales.resize((size_t)(3 * n));
  out.v_opacities.resize((size_t)n), out.v_viewmats.resize((size_t)(16 * s.cameras));
  out.v_colors.resize(s.color_channels ? s.colors.size() : 0), out.v_extra.resize(s.extra.size());
  p.v_means2d = v_means2d.data(), p.v_conics = v_conics.data(), p.v_opacities2d = v_opacities2d.data(), p.v_features = v_features.data();
  p.v_means = out.v_means.data(), p.v_quats = out.v_quats.data(), p.v_scales = out.v_scales.data(), p.v_opacities = out.v_opacities.data();
  p.v_colors = data_or_null(out.v_colors), p.v_extra = data_or_null(out.v_extra), p.v_viewmats = out.v_viewmats.data();
  if (nse_project_backward(&p)) violation(call, "the projection's backward pass reports an error");
  return 0;
}

template <class F>
void for_each_output(Result& a, Result& b, F body) {
  Floats Result::*members[] = {&Result::render, &Result::alpha, &Result::v_means, &Result::v_quats, &Result::v_scales,
                               &Result::v_opacities, &Result::v_colors, &Result::v_extra, &Result::v_viewmats,
                               &Result::v_backgrounds, &Result::v_abs};
  for (Floats Result::*m : members) body(a.*m, b.*m);
}

void fuzz_raster(uint64_t call, Random& r) {
  const bool ordinary = r.one_in(3);
  const Scene s = draw_scene(r, ordinary);
  const uint64_t seed = r.next();
  Result one;
  const int status = run(call, s, 1, seed, one);
  if (s.broken && !(status & s.broken)) violation(call, "a value that is not finite was not reported");
  if (!s.broken && status & ~(NSE_BAD_COLORS | NSE_BAD_EXTRA)) violation(call, "finite values were refused");
  if (status) return;
  for (float v : one.alpha)
    if (!(v >= 0.0f && v <= 1.0f)) violation(call, "opacity outside [0, 1]");
  if (s.ordinary) for_each_output(one, one, [&](const Floats& values, const Floats&) {
      if (!all_finite(values)) violation(call, "an ordinary scene gave NaN or infinity");
    });
  if (!r.one_in(4)) return;
  Result three;
  run(call, s, 3, seed, three);
  for_each_output(one, three, [&](const Floats& x, const Floats& y) {
    if (x.size() != y.size() || (!x.empty() && std::memcmp(x.data(), y.data(), sizeof(float) * x.size())))
      violation(call, "the number of threads changed the result");
  });
}

// Mean SSIM of random images, in double precision, and its gradient.
double run_ssim(uint64_t call, Random& r, Floats& grad) {
  const int64_t batch = 1 + r.below(2), channels = 1 + r.below(3), height = 11 + r.below(20), width = 11 + r.below(30);
  const int64_t size = batch * channels * height * width, inner = batch * channels * (height - 10) * (width - 10);
  Floats pred((size_t)size), target((size_t)size), derivatives((size_t)(3 * inner));
  grad.resize((size_t)size);
  for (float& v : pred) v = r.uniform();
  for (float& v : target) v = r.one_in(16) ? 0.0f : r.uniform();
  NseSsimArgs a = {};
  a.batch = batch, a.channels = channels, a.height = height, a.width = width, a.threads = 1 + r.below(3);
  const bool last = r.one_in(2);  // channels last
  const int64_t first_strides[] = {channels * height * width, height * width, width, 1};
  const int64_t last_strides[] = {channels * height * width, 1, width * channels, channels};
  for (int i = 0; i < 4; ++i) a.pred_strides[i] = a.target_strides[i] = a.grad_strides[i] = (last ? last_strides : first_strides)[i];
  double mean = NAN;
  a.pred = pred.data(), a.target = target.data(), a.mean = &mean, a.derivatives = derivatives.data(), a.grad = grad.data(), a.scale = 1.0f;
  if (nse_ssim_forward(&a) || nse_ssim_backward(&a)) violation(call, "SSIM reports an error");
  return mean;
}

void fuzz_ssim(uint64_t call, Random& r) {
  Floats grad;
  const double mean = run_ssim(call, r, grad);
  if (!(mean > -1.001 && mean < 1.001) || !all_finite(grad)) violation(call, "SSIM outside [-1, 1] or its gradient not finite");
}

// Cost of random planes, of which some are broken, with sources in front, behind and aside.
Floats run_patch_cost(Random r, bool ordinary, int threads) {
  const int64_t pixels = 16 + r.below(3000);
  const int32_t samples = 1 + 2 * r.below(5), sources = r.below(5);
  const auto floats = [&](int64_t count, float low, float high) {
    Floats values((size_t)count);
    for (float& v : values) v = low + (high - low) * r.uniform();
    return values;
  };
  const auto whole = [&](Floats values) {
    if (!ordinary && r.one_in(2)) values[(size_t)r.below((int)values.size())] = r.pick({NAN, INFINITY, -INFINITY, FLT_MAX, -FLT_MAX});
    return values;
  };
  const Floats weights = floats(samples * pixels, 0, 1.0f / samples), view = floats(samples * pixels, 0, 1);
  const Floats mean = floats(pixels, 0, 1), variance = floats(pixels, 0, 0.25f), offsets = floats(2 * samples, -4, 4);
  const Floats planes = whole(floats(3 * pixels, -1, 1));
  std::vector<Floats> bases, moves;
  std::vector<std::vector<int32_t>> pairs;
  std::vector<NsePatchSource> given;
  for (int32_t n = 0; n < sources; ++n) {
    const int64_t height = 1 + r.below(20), width = 1 + r.below(20);
    bases.push_back(whole(floats(3 * pixels, -2, 2))), moves.push_back(whole(floats(3 * samples, -0.1f, 0.1f)));
    pairs.emplace_back((size_t)(height * (width + 1)));
    for (int32_t& pair : pairs.back()) pair = (int32_t)(uint32_t)r.next();
    given.push_back({pairs.back().data(), bases.back().data(), moves.back().data(), height, width, {r.normal(), r.normal(), r.normal()}, 0});
  }
  Floats cost((size_t)pixels, NAN);
  NsePatchArgs a = {};
  a.pixels = pixels, a.sources = sources, a.samples = samples, a.threads = threads, a.floor = 4e-4f, a.source = given.data();
  a.weights = weights.data(), a.view = view.data(), a.mean = mean.data(), a.variance = variance.data();
  a.offsets = offsets.data(), a.planes = planes.data(), a.cost = cost.data();
  nse_patch_cost(&a);
  return cost;
}

void fuzz_patch_cost(uint64_t call, Random& r) {
  const Random same = {r.next()};
  const bool ordinary = r.one_in(2);
  const Floats cost = run_patch_cost(same, ordinary, 1);
  if (!all_finite(cost)) violation(call, "a matching cost is not finite");
  if (cost != run_patch_cost(same, ordinary, 3)) violation(call, "the number of threads changed the matching cost");
}

bool write(std::FILE* file, const Floats& values) {
  const int64_t size = (int64_t)values.size();
  return std::fwrite(&size, sizeof size, 1, file) == 1 && std::fwrite(values.data(), sizeof(float), values.size(), file) == values.size();
}

bool write_outputs(std::FILE* file, uint64_t calls, Random& r) {
  bool good = true;
  for (uint64_t call = 0; good && call < calls; ++call) {
    if (call % 16 == 15) {
      Floats grad;
      const double mean = run_ssim(call, r, grad);
      good = write(file, {(float)mean}) && write(file, grad);
    } else if (call % 16 == 14) {
      good = write(file, run_patch_cost({r.next()}, true, 1));
    } else {
      const Scene s = draw_scene(r, true);
      Result out;
      if (run(call, s, 1, r.next(), out)) violation(call, "ordinary values were refused");
      for_each_output(out, out, [&](const Floats& values, const Floats&) { good = good && write(file, values); });
    }
  }
  return good;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 4 && count != 5) return std::printf("usage: fuzz CALLS SEED INSTRUCTION_SET [FILE]\n"), 2;
  const uint64_t calls = std::strtoull(arguments[1], nullptr, 10);
  Random r = {std::strtoull(arguments[2], nullptr, 10)};
  if (!nse_select_isa(arguments[3])) return std::printf("%s does not run here\n", arguments[3]), 2;
  if (count == 5) {
    std::FILE* file = std::fopen(arguments[4], "wb");
    const bool written = file && write_outputs(file, calls, r);
    if (!file || std::fclose(file) || !written) return std::printf("%s cannot be written\n", arguments[4]), 2;
    return 0;
  }
  for (uint64_t call = 0; call < calls; ++call) {
    if (call % 16 == 15)
      fuzz_ssim(call, r);
    else if (call % 16 == 14)
      fuzz_patch_cost(call, r);
    else
      fuzz_raster(call, r);
  }
  std::printf("%llu calls, %s, seed %s: no violation\n", (unsigned long long)calls, arguments[3], arguments[2]);
  return 0;
}
