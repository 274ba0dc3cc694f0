// A whole population through one network.
//
// Individuals are sorted by their genes, in the order in which the network meets them, so that those
// which agree on the first layers are neighbours: they share the results of these layers, and each
// distinct beginning is computed once. A layer computes the channels that any of the individuals
// before it wants; each then reads its own through pointers. The walk goes through all layers of one
// block of images before the next one, so that activations stay in the cache.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <mutex>
#include <numeric>
#include <stdexcept>

#include "common/parallel.h"
#include "network/cpu/blocks.h"
#include "network/schedule.h"
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastkd::cpu {
namespace {

// Buffers given back are taken again. Where none is large enough, the largest is replaced, so that there
// are never more of some size or above than were lent at once when one of these was asked for.
class Pool {
  public:
    ~Pool() {
        for (auto& b : free_) std::free(b.data);
    }
    // What a buffer of so many bytes takes.
    static std::int64_t size(std::int64_t bytes) {
        return round_up(bytes + kLine, bytes + kLine >= kHuge ? kHuge : kLine);
    }
    std::shared_ptr<char> take(std::int64_t bytes) {
        bytes = size(bytes);
        auto best = free_.end(), largest = free_.end();
        for (auto b = free_.begin(); b != free_.end(); ++b) {
            if (b->bytes >= bytes && (best == free_.end() || b->bytes < best->bytes)) best = b;
            if (largest == free_.end() || b->bytes > largest->bytes) largest = b;
        }
        Buffer buffer{nullptr, bytes};
        if (best != free_.end()) {
            buffer = *best;
            free_.erase(best);
        } else {
            if (largest != free_.end()) {
                std::free(largest->data);
                held_ -= largest->bytes;
                free_.erase(largest);
            }
            buffer.data = static_cast<char*>(
                std::aligned_alloc(std::size_t(bytes >= kHuge ? kHuge : kLine), std::size_t(bytes)));
            if (!buffer.data) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
            if (bytes >= kHuge) madvise(buffer.data, std::size_t(bytes), MADV_HUGEPAGE);
#endif
            held_ += bytes;
            most_ = std::max(most_, held_);
        }
        return {buffer.data, [this, buffer](char*) { free_.push_back(buffer); }};
    }
    std::int64_t most() const { return most_; }

  private:
    static constexpr std::int64_t kHuge = 2 << 20;
    struct Buffer {
        char* data;
        std::int64_t bytes;
    };
    std::vector<Buffer> free_;
    std::int64_t held_ = 0, most_ = 0;
};

// A value while it is alive: a plane per block and channel, null where not computed.
struct Live {
    std::vector<void*> planes;
    std::vector<std::shared_ptr<char>> owners;
    void clear() { planes.clear(), owners.clear(); }
};

}  // namespace

struct Network::Plan : Program {
    using Program::Program;
    // At least what planes of all channels take: the same for all individuals, so
    // that buffers fit the next one.
    std::int64_t bytes_of(const Value& v, std::int64_t images) const {
        return v.channels *
               (round_up(v.height * v.width * images * size_of(dtype), kLine) + kMostLines * kLine);
    }
    std::int64_t most_bytes(const Schedule&, const ImageBlocks&, std::int64_t count,
                            std::int64_t individuals) const;
    mutable std::atomic<std::int64_t> taken{0};  // by the buffers of the last run
};

namespace {

template <class Plan> class Walk {
  public:
    Walk(const Plan& plan, const Schedule& s, const NetworkRun& run, const ImageBlocks& blocks,
         const Sorted& sorted, Pool& pool, std::int64_t first_block, std::int64_t num_blocks)
        : plan_(plan),
          s_(s),
          run_(run),
          blocks_(blocks),
          sorted_(sorted.individual),
          agree_(sorted.agree),
          first_(first_block),
          count_(num_blocks),
          pool_(pool),
          live_(plan.values.size()) {}

    void operator()(std::int64_t begin, std::int64_t end) {
        if (!run_.x_stride) {
            load(0);
            return descend(0, begin, end, -1);
        }
        for (std::int64_t k = begin; k < end; ++k) {
            load(sorted_[std::size_t(k)]);
            descend(0, k, k + 1, -1);
        }
    }

  private:
    bool kept(std::int64_t k, std::int32_t gene) const {
        return plan_.kept(run_.masks + sorted_[std::size_t(k)] * plan_.genes, gene);
    }
    std::int64_t images(std::int64_t b) const { return blocks_.padded(first_ + b); }
    const Value& value(int v) const { return plan_.values[std::size_t(v)]; }
    void* plane(int v, std::int64_t b, std::int64_t c) const {
        return live_[std::size_t(v)].planes[std::size_t(b * value(v).channels + c)];
    }

    // Planes for the channels of v; those that are not wanted stay null.
    void allocate(int v, const std::vector<std::int32_t>& channels) {
        const Value& shape = value(v);
        Live& live = live_[std::size_t(v)];
        live.planes.assign(std::size_t(count_ * shape.channels), nullptr);
        live.owners.clear();
        std::int64_t bytes = 0;
        for (std::int64_t b = 0; b < count_; ++b) bytes += plan_.bytes_of(shape, images(b));
        live.owners.push_back(pool_.take(bytes));
        char* next = live.owners[0].get();
        for (std::int64_t b = 0; b < count_; ++b)
            for (std::int32_t c : channels) {
                live.planes[std::size_t(b * shape.channels + c)] = next;
                next += plane_step(shape.height * shape.width, images(b), size_of(plan_.dtype));
            }
    }

    PlaneTransfer transfer(void* outer, DType dtype, const Value& shape, std::int64_t b,
                           std::int64_t c) const {
        const std::int64_t pixels = shape.height * shape.width, image = pixels * shape.channels;
        char* at =
            static_cast<char*>(outer) + (blocks_.first(first_ + b) * image + c * pixels) * size_of(dtype);
        return {at, dtype, image, pixels, images(b), blocks_.valid(first_ + b), nullptr};
    }

    void load(std::int64_t individual) {
        const Value& shape = value(0);
        std::vector<std::int32_t> all(std::size_t(shape.channels));
        std::iota(all.begin(), all.end(), 0);
        allocate(0, all);
        char* x = const_cast<char*>(static_cast<const char*>(run_.x)) +
                  individual * run_.x_stride * size_of(run_.x_dtype);
        for (std::int64_t b = 0; b < count_; ++b)
            for (std::int64_t c = 0; c < shape.channels; ++c) {
                PlaneTransfer t = transfer(x, run_.x_dtype, shape, b, c);
                t.plane = plane(0, b, c);
                plane_load(plan_.dtype, t);
            }
    }

    void store(std::int64_t begin, std::int64_t end) {
        if (!run_.out) return;
        const Value& shape = value(plan_.output);
        const std::int64_t pixels = shape.height * shape.width, size = size_of(run_.out_dtype);
        const std::int64_t row = blocks_.images * shape.channels * pixels * size;
        for (std::int64_t k = begin; k < end; ++k) {
            char* out = static_cast<char*>(run_.out) + sorted_[std::size_t(k)] * row;
            for (std::int64_t b = 0; b < count_; ++b)
                for (std::int64_t c = 0; c < shape.channels; ++c) {
                    PlaneTransfer t = transfer(out, run_.out_dtype, shape, b, c);
                    t.plane = plane(plan_.output, b, c);
                    if (t.plane && kept(k, shape.genes[std::size_t(c)])) {
                        plane_store(plan_.dtype, t);
                        continue;
                    }
                    for (std::int64_t n = 0; n < t.valid; ++n)
                        std::memset(static_cast<char*>(t.outer) + n * t.image_step * size, 0,
                                    std::size_t(pixels * size));
                }
        }
    }

    // Row of the scale (shift) of a norm that an individual uses.
    const char* affine(const Step& step, std::int64_t k, bool shift) const {
        const Affine* given = run_.affines ? &run_.affines[step.norm] : nullptr;
        if (!given || !given->scale)
            return static_cast<const char*>(shift ? step.affine->shift : step.affine->scale);
        return static_cast<const char*>(shift ? given->shift : given->scale) +
               sorted_[std::size_t(k)] * given->stride * size_of(plan_.dtype);
    }
    double number(const char* row, std::int64_t c) const {
        if (plan_.dtype == DType::f64) return reinterpret_cast<const double*>(row)[c];
        return reinterpret_cast<const float*>(row)[c];
    }

    // The end of the individuals from `begin` on that share this step.
    std::int64_t sharing(const Step& step, std::int64_t begin, std::int64_t end) {
        std::int64_t k = begin + 1;
        while (k < end && agree_[std::size_t(k)] >= step.seen) ++k;
        if (step.norm < 0 || !run_.affines || !run_.affines[step.norm].stride) return k;
        // Individuals with parameters of their own share it if they agree on every channel that both keep.
        const auto& genes = value(step.node.output).genes;
        std::vector<std::int64_t> owner(genes.size(), -1);
        for (std::int64_t i = begin; i < k; ++i)
            for (std::size_t c = 0; c < genes.size(); ++c) {
                if (!kept(i, genes[c])) continue;
                if (owner[c] < 0) owner[c] = i;
                for (bool shift : {false, true})
                    if (std::memcmp(affine(step, i, shift) + c * std::size_t(size_of(plan_.dtype)),
                                    affine(step, owner[c], shift) + c * std::size_t(size_of(plan_.dtype)),
                                    std::size_t(size_of(plan_.dtype))))
                        return i;
            }
        return k;
    }

    // Steps from k on. Where the individuals part, values made before step `pending` are kept for those
    // that follow.
    void descend(std::size_t k, std::int64_t begin, std::int64_t end, int pending) {
        for (const std::size_t last = run_.out ? s_.steps.size() : s_.measured; k < last; ++k) {
            const Step& step = s_.steps[k];
            std::int64_t part = sharing(step, begin, end);
            if (part < end) {
                for (; begin < end; begin = part) {
                    part = sharing(step, begin, end);
                    descend(k, begin, part, part < end ? int(k) : pending);
                }
                return;
            }
            execute(step, begin, end);
            for (int v : step.dying)
                if (s_.producer[std::size_t(v)] >= pending) live_[std::size_t(v)].clear();
        }
        store(begin, end);
        for (std::size_t v = 0; v < live_.size(); ++v)
            if (s_.producer[v] >= pending) live_[v].clear();
    }

    // Channels of v that some individual wants.
    std::vector<std::int32_t> wanted(int v, std::int64_t begin, std::int64_t end) const {
        std::vector<std::int32_t> channels;
        const auto& genes = value(v).genes;
        for (std::size_t c = 0; c < genes.size(); ++c)
            for (std::int64_t k = begin; k < end; ++k)
                if (kept(k, genes[c])) {
                    channels.push_back(std::int32_t(c));
                    break;
                }
        return channels;
    }
    // The first of them that keeps channel c of v.
    std::int64_t keeper(int v, std::int32_t c, std::int64_t begin, std::int64_t end) const {
        while (begin + 1 < end && !kept(begin, value(v).genes[std::size_t(c)])) ++begin;
        return begin;
    }

    // Channel c of v as `individual` sees it.
    void* seen_by(std::int64_t individual, int v, std::int64_t b, std::int64_t c) const {
        return kept(individual, value(v).genes[std::size_t(c)]) ? plane(v, b, c) : nullptr;
    }

    void execute(const Step& step, std::int64_t begin, std::int64_t end) {
        poll();
        const Node& node = step.node;
        const auto channels = wanted(node.output, begin, end);
        switch (node.kind) {
            case Operation::select:
                return select(node, channels);
            case Operation::flatten:
                return flatten(node);
            default:
                break;
        }
        allocate(node.output, channels);
        switch (node.kind) {
            case Operation::conv:
                return conv(step, channels, begin, end);
            case Operation::norm:
            case Operation::activation:
                return norm(step, channels, begin, end);
            case Operation::add:
                return add(step, channels, begin, end);
            case Operation::multiply:
                return multiply(node, channels, begin, end);
            default:
                return pool(node, channels, begin, end);
        }
    }

    // A convolution for some individuals: what does not depend on the images.
    struct Layer {
        struct Group {
            std::size_t first, last;              // of the channels
            std::size_t first_input, last_input;  // of the inputs
            std::size_t packed;                   // bytes
        };
        std::vector<std::int32_t> inputs;
        std::vector<std::int64_t> keepers;  // of the channels
        std::vector<Group> groups;
        std::vector<char> scale, shift, packed;
    };

    void prepare(Layer& layer, const Step& step, const std::vector<std::int32_t>& channels,
                 std::int64_t begin, std::int64_t end) {
        const Node& node = step.node;
        const Value &in = value(node.inputs[0]), &out = value(node.output);
        const std::int64_t size = size_of(plan_.dtype), taps = node.kernel[0] * node.kernel[1];
        const std::int64_t group_in = in.channels / node.groups, group_out = out.channels / node.groups;
        layer.scale.resize(channels.size() * std::size_t(size));
        layer.shift.resize(layer.scale.size());
        layer.inputs.clear(), layer.keepers.clear(), layer.groups.clear();
        for (std::size_t j = 0; j < channels.size(); ++j) {
            const std::int32_t c = channels[j];
            const std::int64_t k = keeper(node.output, c, begin, end);
            double a = 1, b = node.bias ? number(static_cast<const char*>(node.bias), c) : 0;
            if (step.norm >= 0) {
                a = number(affine(step, k, false), c);
                b = b * a + number(affine(step, k, true), c);
            }
            layer.keepers.push_back(k);
            put(layer.scale, j, a), put(layer.shift, j, b);
        }
        std::vector<std::int32_t> within;  // the inputs of a group, from its first
        std::size_t bytes = 0;
        for (std::size_t j = 0; j < channels.size();) {
            const std::int64_t group = channels[j] / group_out;
            std::size_t last = j;
            while (last < channels.size() && channels[last] / group_out == group) ++last;
            within.clear();
            for (std::int64_t c = 0; c < group_in; ++c)
                if (seen_by(begin, node.inputs[0], 0, group * group_in + c))
                    within.push_back(std::int32_t(c));
            // Of a channel by itself, as in a depthwise convolution, the keepers may differ: it is read
            // by those that keep the output.
            if (group_in == 1 && within.empty() && plane(node.inputs[0], 0, group) &&
                seen_by(layer.keepers[j], node.inputs[0], 0, group))
                within.push_back(0);
            const std::int64_t n = std::int64_t(last - j), inputs = std::int64_t(within.size());
            const std::size_t first = layer.inputs.size(), packed = bytes;
            bytes += std::size_t(n * inputs * taps * size);
            if (layer.packed.size() < bytes) layer.packed.resize(bytes);
            pack_weights(plan_.dtype, {node.weight, group_in * taps, taps, within.data(), channels.data() + j,
                                       inputs, n, layer.packed.data() + packed});
            for (std::int32_t c : within) layer.inputs.push_back(std::int32_t(group * group_in + c));
            layer.groups.push_back({j, last, first, layer.inputs.size(), packed});
            j = last;
        }
    }

    void conv(const Step& step, const std::vector<std::int32_t>& channels, std::int64_t begin,
              std::int64_t end) {
        prepare(layer_, step, channels, begin, end);
        const std::size_t size = std::size_t(size_of(plan_.dtype));
        auto q = geometry<PlaneConv>(step.node);
        for (std::int64_t b = 0; b < count_; ++b) {
            poll();
            in_planes_.clear(), out_planes_.clear(), residual_.clear();
            for (std::int32_t c : layer_.inputs) in_planes_.push_back(plane(step.node.inputs[0], b, c));
            for (std::size_t j = 0; j < channels.size(); ++j) {
                out_planes_.push_back(plane(step.node.output, b, channels[j]));
                if (step.residual >= 0)
                    residual_.push_back(seen_by(layer_.keepers[j], step.residual, b, channels[j]));
            }
            q.images = images(b);
            for (const auto& g : layer_.groups) {
                q.inputs = std::int64_t(g.last_input - g.first_input);
                q.outputs = std::int64_t(g.last - g.first);
                q.packed = layer_.packed.data() + g.packed;
                q.scale = layer_.scale.data() + g.first * size;
                q.shift = layer_.shift.data() + g.first * size;
                q.in = in_planes_.data() + g.first_input, q.out = out_planes_.data() + g.first;
                q.tail = {step.residual >= 0 ? residual_.data() + g.first : nullptr, step.activation,
                          step.param};
                plane_conv(plan_.dtype, q);
            }
        }
    }

    void put(std::vector<char>& row, std::size_t j, double x) const {
        if (plan_.dtype == DType::f64) reinterpret_cast<double*>(row.data())[j] = x;
        else reinterpret_cast<float*>(row.data())[j] = float(x);
    }

    void norm(const Step& step, const std::vector<std::int32_t>& channels, std::int64_t begin,
              std::int64_t end) {
        const Node& node = step.node;
        const Value& shape = value(node.output);
        const std::int64_t pixels = shape.height * shape.width;
        for (std::int32_t c : channels) {
            const std::int64_t k = keeper(node.output, c, begin, end);
            double scale = 1, shift = 0;
            if (node.kind == Operation::norm) {
                if (run_.moments && node.batch) {
                    double mean = 0, variance = 0;
                    if (seen_by(k, node.inputs[0], 0, c)) {
                        mean = moment(node.inputs[0], c, 0, 1);
                        variance = moment(node.inputs[0], c, mean, 2);
                    }
                    for (std::int64_t i = begin; i < end; ++i) {
                        if (!kept(i, shape.genes[std::size_t(c)])) continue;
                        const std::int64_t at = sorted_[std::size_t(i)] * shape.channels + c;
                        static_cast<double*>(run_.moments[step.norm].mean)[at] = mean;
                        static_cast<double*>(run_.moments[step.norm].variance)[at] = variance;
                    }
                    scale = (node.weight ? number(static_cast<const char*>(node.weight), c) : 1) /
                            std::sqrt(variance + node.param);
                    shift = (node.bias ? number(static_cast<const char*>(node.bias), c) : 0) - mean * scale;
                } else {
                    scale = number(affine(step, k, false), c), shift = number(affine(step, k, true), c);
                }
            }
            for (std::int64_t b = 0; b < count_; ++b) {
                const void* residual = step.residual >= 0 ? seen_by(k, step.residual, b, c) : nullptr;
                plane_pointwise(plan_.dtype, {pixels,
                                              images(b),
                                              seen_by(k, node.inputs[0], b, c),
                                              scale,
                                              shift,
                                              {residual ? &residual : nullptr, step.activation, step.param},
                                              plane(node.output, b, c)});
            }
        }
    }

    // The mean of (x - mean)^power over the batch: images in order, whatever the blocks.
    double moment(int v, std::int64_t c, double mean, int power) const {
        const std::int64_t pixels = value(v).height * value(v).width;
        double total = 0, sums[kMostLines * kLine / 4];
        for (std::int64_t b = 0; b < count_; ++b) {
            plane_moment(plan_.dtype, {pixels, images(b), plane(v, b, c), mean, power, sums});
            for (std::int64_t n = 0; n < blocks_.valid(first_ + b); ++n) total += sums[n];
        }
        return total / double(blocks_.images * pixels);
    }

    void add(const Step& step, const std::vector<std::int32_t>& channels, std::int64_t begin,
             std::int64_t end) {
        const Node& node = step.node;
        const Value& shape = value(node.output);
        for (std::int32_t c : channels) {
            const std::int64_t k = keeper(node.output, c, begin, end);
            for (std::int64_t b = 0; b < count_; ++b) {
                const void* sum = seen_by(k, node.inputs[0], b, c);
                for (std::size_t i = 1; i < node.inputs.size(); ++i) {
                    const bool last = i + 1 == node.inputs.size();
                    const void* x = seen_by(k, node.inputs[i], b, c);
                    plane_pointwise(plan_.dtype, {shape.height * shape.width,
                                                  images(b),
                                                  sum,
                                                  1,
                                                  0,
                                                  {x ? &x : nullptr,
                                                   last ? step.activation : Activation::none, step.param},
                                                  plane(node.output, b, c)});
                    sum = plane(node.output, b, c);
                }
            }
        }
    }

    void multiply(const Node& node, const std::vector<std::int32_t>& channels, std::int64_t begin,
                  std::int64_t end) {
        const Value &shape = value(node.output), &gate = value(node.inputs[1]);
        const std::int64_t pixels = shape.height * shape.width;
        for (std::int32_t c : channels) {
            const std::int64_t k = keeper(node.output, c, begin, end);
            for (std::int64_t b = 0; b < count_; ++b) {
                const void *x = seen_by(k, node.inputs[0], b, c), *g = seen_by(k, node.inputs[1], b, c);
                void* out = plane(node.output, b, c);
                if (x && g)
                    plane_product(plan_.dtype,
                                  {pixels, images(b), x, g, gate.height * gate.width != pixels, out});
                else
                    plane_pointwise(plan_.dtype,
                                    {pixels, images(b), nullptr, 1, 0, {nullptr, Activation::none, 0}, out});
            }
        }
    }

    // A convolution's or a pool's sizes; all else is 0.
    template <class Layer> Layer geometry(const Node& node) const {
        const Value &in = value(node.inputs[0]), &out = value(node.output);
        Layer q{};
        for (int axis = 0; axis < 2; ++axis) {
            q.size[axis] = axis ? in.width : in.height;
            q.out_size[axis] = axis ? out.width : out.height;
            q.kernel[axis] = node.kernel[axis], q.stride[axis] = node.stride[axis];
            q.padding[axis] = node.padding[axis], q.dilation[axis] = node.dilation[axis];
        }
        return q;
    }

    void pool(const Node& node, const std::vector<std::int32_t>& channels, std::int64_t begin,
              std::int64_t end) {
        const Value& out = value(node.output);
        auto q = geometry<PlanePool>(node);
        q.max = node.kind == Operation::max_pool, q.count_padding = node.count_padding;
        for (std::int32_t c : channels) {
            const std::int64_t k = keeper(node.output, c, begin, end);
            for (std::int64_t b = 0; b < count_; ++b) {
                q.images = images(b);
                q.in = seen_by(k, node.inputs[0], b, c), q.out = plane(node.output, b, c);
                if (q.in) plane_pool(plan_.dtype, q);
                else
                    plane_pointwise(plan_.dtype, {out.height * out.width,
                                                  images(b),
                                                  nullptr,
                                                  1,
                                                  0,
                                                  {nullptr, Activation::none, 0},
                                                  q.out});
            }
        }
    }

    void select(const Node& node, const std::vector<std::int32_t>& channels) {
        const Value& shape = value(node.output);
        Live& live = live_[std::size_t(node.output)];
        live.planes.assign(std::size_t(count_ * shape.channels), nullptr);
        live.owners.clear();
        for (int v : node.inputs)
            live.owners.insert(live.owners.end(), live_[std::size_t(v)].owners.begin(),
                               live_[std::size_t(v)].owners.end());
        for (std::int32_t c : channels) {
            const std::int32_t input = node.select[std::size_t(2 * c)];
            if (input < 0) continue;
            for (std::int64_t b = 0; b < count_; ++b)
                live.planes[std::size_t(b * shape.channels + c)] =
                    plane(node.inputs[std::size_t(input)], b, node.select[std::size_t(2 * c + 1)]);
        }
    }

    void flatten(const Node& node) {
        const Value &in = value(node.inputs[0]), &out = value(node.output);
        const std::int64_t pixels = in.height * in.width;
        Live &from = live_[std::size_t(node.inputs[0])], &live = live_[std::size_t(node.output)];
        live.owners = from.owners;
        live.planes.assign(std::size_t(count_ * out.channels), nullptr);
        for (std::int64_t b = 0; b < count_; ++b)
            for (std::int64_t c = 0; c < in.channels; ++c)
                if (char* plane = static_cast<char*>(this->plane(node.inputs[0], b, c)))
                    for (std::int64_t p = 0; p < pixels; ++p)
                        live.planes[std::size_t(b * out.channels + c * pixels + p)] =
                            plane + p * images(b) * size_of(plan_.dtype);
    }

    const Plan& plan_;
    const Schedule& s_;
    const NetworkRun& run_;
    const ImageBlocks& blocks_;
    const std::vector<std::int64_t>&sorted_, &agree_;
    std::int64_t first_, count_;
    Pool& pool_;
    std::vector<Live> live_;
    Layer layer_;
    std::vector<const void*> in_planes_, residual_;  // of the convolution that is computed
    std::vector<void*> out_planes_;
};

}  // namespace

Network::Network(DType dtype, std::int64_t genes, std::vector<Value> values, std::vector<Node> nodes,
                 int output)
    : plan_(new Plan(dtype, genes, std::move(values), std::move(nodes), output)) {}
Network::~Network() = default;

std::int64_t Network::norms() const { return plan_->norms; }

Outline Network::outline() const { return plan_->outline(); }

// Of one walk over `count` blocks. A value may be alive, or held for individuals that part from others
// later: what was alive where they part. There is a buffer for each of these at most, and none larger
// than the largest value met while there are so many.
std::int64_t Network::Plan::most_bytes(const Schedule& s, const ImageBlocks& blocks, std::int64_t count,
                                       std::int64_t individuals) const {
    const int steps = int(s.steps.size());
    struct Buffer {
        int made = -1, dies = -1;  // steps
    };
    std::vector<Buffer> buffers(values.size());
    for (int k = steps; k-- > 0;) {
        const Step& step = s.steps[std::size_t(k)];
        for (int v : step.dying) buffers[std::size_t(v)].dies = std::max(buffers[std::size_t(v)].dies, k);
        buffers[std::size_t(step.node.output)].made = k;
    }
    buffers[std::size_t(output)].dies = steps;
    for (int k = steps; k-- > 0;) {
        const Node& node = s.steps[std::size_t(k)].node;
        if (node.kind != Operation::select && node.kind != Operation::flatten) continue;
        // A list of planes of others, which live as long.
        Buffer& list = buffers[std::size_t(node.output)];
        for (int v : node.inputs)
            buffers[std::size_t(v)].dies = std::max(buffers[std::size_t(v)].dies, list.dies);
        list = Buffer{};
    }
    std::vector<std::pair<std::int64_t, std::int64_t>> met;  // bytes of a value, buffers with it
    std::vector<char> held(values.size(), 0);
    std::int64_t most_held = 0;
    for (int k = -1; k < steps; ++k) {
        const int v = k < 0 ? 0 : s.steps[std::size_t(k)].node.output;
        auto alive = [&](std::size_t v) {
            const bool made = v == 0 || (buffers[v].made >= 0 && buffers[v].made < k);
            return made && buffers[v].dies >= k;
        };
        // Individuals part where they differ in a gene, or in a norm of their own.
        if (k >= 0 && (s.steps[std::size_t(k)].norm >= 0 ||
                       s.steps[std::size_t(k)].seen > (k ? s.steps[std::size_t(k - 1)].seen : 0))) {
            std::int64_t now = 0;
            for (std::size_t i = 0; i < values.size(); ++i)
                if (alive(i)) held[i] = 1, ++now;
            most_held = std::max(most_held, now);
        }
        std::int64_t living = 1, waiting = 0;
        for (std::size_t i = 0; i < values.size(); ++i) {
            if (int(i) == v) continue;
            if (alive(i)) ++living;
            else waiting += held[i];
        }
        if (v != 0 && buffers[std::size_t(v)].made != k) continue;
        std::int64_t bytes = 0;
        for (std::int64_t b = 0; b < count; ++b) bytes += bytes_of(values[std::size_t(v)], blocks.padded(b));
        met.emplace_back(Pool::size(bytes), living + std::min(waiting, (individuals - 1) * most_held));
    }
    std::sort(met.rbegin(), met.rend());
    std::int64_t total = 0, number = 0;
    for (const auto& [bytes, together] : met) {
        total += std::max<std::int64_t>(together - number, 0) * bytes;
        number = std::max(number, together);
    }
    return total;
}

std::int64_t Network::bytes(std::int64_t images, bool recalibrate, std::int64_t individuals,
                            int threads) const {
    const ImageBlocks blocks(images, size_of(plan_->dtype));
    const Schedule& s = recalibrate ? plan_->recalibrate : plan_->inherit;
    std::int64_t weights = 0;  // of a layer, as they are packed
    for (const Node& n : plan_->nodes)
        if (n.kind == Operation::conv)
            weights = std::max(weights, plan_->values[std::size_t(n.output)].channels *
                                            plan_->values[std::size_t(n.inputs[0])].channels / n.groups *
                                            n.kernel[0] * n.kernel[1] * size_of(plan_->dtype));
    // In a vector that may be twice as large.
    return threads *
           (plan_->most_bytes(s, blocks, recalibrate ? blocks.count : 1, individuals) + 2 * weights);
}

std::int64_t Network::taken() const { return plan_->taken; }

void Network::run(const NetworkRun& run, int threads) const {
    const Plan& plan = *plan_;
    const std::int64_t individuals = run.individuals;
    if (!individuals || !run.images) return;
    const Schedule& s = run.moments ? plan.recalibrate : plan.inherit;
    threads = threads_for(plan.work * run.images * individuals / 8, threads);
    if (run.moments)
        for (std::size_t k = 0; k < plan.nodes.size(); ++k)
            if (plan.norm_of[k] >= 0) {
                const Moments& m = run.moments[plan.norm_of[k]];
                const std::int64_t n = individuals * plan.values[std::size_t(plan.nodes[k].output)].channels;
                std::fill_n(static_cast<double*>(m.mean), n, 0.0);
                std::fill_n(static_cast<double*>(m.variance), n, 1.0);
            }

    const Sorted sorted(plan, s, run.masks, individuals);
    // A task is a block of images, or all of them where a norm needs the whole batch, and some
    // neighbours: as few cuts between them as keep the threads busy.
    const ImageBlocks blocks(run.images, size_of(plan.dtype));
    const std::int64_t image_tasks = run.moments ? 1 : blocks.count, step = run.moments ? blocks.count : 1;
    std::int64_t ranges = 1;
    if (threads > 1 && image_tasks % threads) ranges = (4 * threads + image_tasks - 1) / image_tasks;
    ranges = std::min(ranges, individuals);
    std::vector<std::unique_ptr<Pool>> pools;  // of tasks that are done, for those that follow
    std::mutex mutex;
    parallel_for(image_tasks * ranges, threads, [&](std::int64_t task) {
        const std::int64_t block = task / ranges, range = task % ranges;
        std::unique_ptr<Pool> pool;
        {
            const std::lock_guard<std::mutex> lock(mutex);
            if (!pools.empty()) pool = std::move(pools.back()), pools.pop_back();
        }
        if (!pool) pool = std::make_unique<Pool>();
        {
            Walk<Plan> walk(plan, s, run, blocks, sorted, *pool, block * step, step);
            walk(individuals * range / ranges, individuals * (range + 1) / ranges);
        }
        const std::lock_guard<std::mutex> lock(mutex);
        pools.push_back(std::move(pool));
    });
    plan.taken = 0;
    for (const auto& pool : pools) plan.taken += pool->most();
}

}  // namespace fastkd::cpu
