// The gradients of a convolution of a masked population.
//
// A task is some blocks of images for some individuals, cut by their numbers alone. Each has a gradient of
// its own of whatever the tasks share, and these are added in order: so no sum depends on the threads.
#include "network/conv_backward.h"

#include <atomic>
#include <cstring>

#include "common/parallel.h"
#include "network/cpu/memory.h"
#include "network/cpu/planes_backward.h"

namespace fastkd::cpu {
namespace {

constexpr std::int64_t kTasks = 8;  // enough to share among threads; each costs a copy of what is shared

struct Free {
    void operator()(char* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<char, Free>;
Buffer buffer(std::int64_t bytes) { return Buffer(allocate(round_up(bytes + 1, kHuge))); }

Buffer zeros(std::int64_t bytes) {
    if (!bytes) return nullptr;
    Buffer b = buffer(bytes);
    std::memset(b.get(), 0, std::size_t(bytes));
    return b;
}

std::int64_t product(const std::int64_t (&pair)[2]) { return pair[0] * pair[1]; }

// See Readers.
struct Axis {
    Axis(const ConvBackward& op, int axis) {
        for (std::int64_t i = 0; i < op.size[axis]; ++i) {
            begin.push_back(std::int32_t(tap.size()));
            for (std::int64_t k = 0; k < op.kernel[axis]; ++k) {
                const std::int64_t at = op.reader(axis, i, k);
                if (at >= 0) tap.push_back(std::int32_t(k)), this->at.push_back(std::int32_t(at));
            }
        }
        begin.push_back(std::int32_t(tap.size()));
    }
    Readers readers() const { return {begin.data(), tap.data(), at.data()}; }
    std::vector<std::int32_t> begin, tap, at;
};

struct Plan {
    Plan(const ConvBackward& op)
        : op(op),
          size(size_of(op.acc)),
          in_pixels(product(op.size)),
          out_pixels(product(op.out_size)),
          row(op.channels / op.groups * product(op.kernel)),
          numbers_x(op.grad_x && op.shared ? op.images * op.channels * in_pixels : 0),
          numbers_weight(op.grad_weight ? op.outputs * row : 0),
          numbers_bias(op.grad_bias ? op.outputs : 0),
          blocks(op.images, size),
          cuts(std::min(blocks.count, kTasks)),
          ranges(std::min(std::max<std::int64_t>(kTasks / cuts, 1), op.individuals)),
          axes{{op, 0}, {op, 1}},
          x_partial(zeros((ranges - 1) * numbers_x * size)),
          partial(zeros((cuts * ranges - 1) * (numbers_weight + numbers_bias) * size)) {}

    // Where a task adds: the first to the result.
    char* grad_x(std::int64_t range) {
        return range ? x_partial.get() + (range - 1) * numbers_x * size : static_cast<char*>(op.grad_x);
    }
    char* grad_weight(std::int64_t task) {
        return task ? partial.get() + (task - 1) * numbers_weight * size : static_cast<char*>(op.grad_weight);
    }
    char* grad_bias(std::int64_t task) {
        if (!task) return static_cast<char*>(op.grad_bias);
        return partial.get() + ((cuts * ranges - 1) * numbers_weight + (task - 1) * numbers_bias) * size;
    }

    const ConvBackward& op;
    std::int64_t size, in_pixels, out_pixels, row;
    std::int64_t numbers_x, numbers_weight, numbers_bias;  // of what the tasks share
    ImageBlocks blocks;
    std::int64_t cuts, ranges;  // tasks: cuts of the blocks x ranges of individuals
    Axis axes[2];
    Buffer x_partial, partial;
};

// out += the rows of partial, in order.
template <class A>
void add(void* out, const char* partial, std::int64_t rows, std::int64_t numbers, int threads) {
    constexpr std::int64_t slice = 1 << 14;
    A* to = static_cast<A*>(out);
    parallel_for(ceil_div(numbers, slice), threads_for(rows * numbers, threads), [&](std::int64_t s) {
        for (std::int64_t r = 0; r < rows; ++r) {
            const A* from = reinterpret_cast<const A*>(partial) + r * numbers;
            for (std::int64_t k = s * slice; k < std::min((s + 1) * slice, numbers); ++k) to[k] += from[k];
        }
    });
}

// What one thread works with.
class Worker {
  public:
    explicit Worker(Plan& plan) : plan_(plan), op_(plan.op) {
        const std::int64_t images = plan.blocks.padded(0);  // of the largest block
        in_step_ = plane_step(plan.in_pixels, images, plan.size);
        out_step_ = plane_step(plan.out_pixels, images, plan.size);
        const std::int64_t group = plan.row * (op_.outputs / op_.groups) * plan.size;
        buffer_ = buffer(2 * op_.channels * in_step_ + op_.outputs * out_step_ + group);
        x_ = buffer_.get(), grad_x_ = x_ + op_.channels * in_step_;
        grad_ = grad_x_ + op_.channels * in_step_, packed_ = grad_ + op_.outputs * out_step_;
        keeps_.resize(std::size_t(op_.channels));
    }

    void operator()(std::int64_t task) {
        const std::int64_t cut = task / plan_.ranges, range = task % plan_.ranges;
        const std::int64_t begin = op_.individuals * range / plan_.ranges;
        const std::int64_t end = op_.individuals * (range + 1) / plan_.ranges;
        weight_ = plan_.grad_weight(task), bias_ = plan_.grad_bias(task);
        const std::int64_t count = plan_.blocks.count;
        for (std::int64_t b = count * cut / plan_.cuts; b < count * (cut + 1) / plan_.cuts; ++b) {
            block_ = b;
            if (op_.shared) load_x(begin, end);
            for (std::int64_t p = begin; p < end; ++p) {
                if (!op_.shared) load_x(p, p + 1);
                individual(p);
                if (!op_.shared) store_x(static_cast<char*>(op_.grad_x), op_.dtype, p);
            }
            if (op_.shared) store_x(plan_.grad_x(range), op_.acc, 0);
        }
    }

  private:
    bool keeps(std::int64_t p, std::int64_t channel) const {
        return !op_.in_mask || op_.in_mask[p * op_.channels + channel];
    }
    bool makes(std::int64_t p, std::int64_t output) const {
        return !op_.out_mask || op_.out_mask[p * op_.outputs + output];
    }
    std::int64_t images() const { return plan_.blocks.padded(block_); }

    // Channel c of individual p's images, as an array outside holds them.
    PlaneTransfer transfer(const void* outer, DType dtype, std::int64_t p, std::int64_t c,
                           std::int64_t channels, std::int64_t pixels, char* plane) const {
        const std::int64_t image = channels * pixels;
        const std::int64_t at = (p * op_.images + plan_.blocks.first(block_)) * image + c * pixels;
        char* from = static_cast<char*>(const_cast<void*>(outer)) + at * size_of(dtype);
        return {from, dtype, image, pixels, images(), plan_.blocks.valid(block_), plane};
    }
    void load(const PlaneTransfer& t) const {
        plane_load(op_.acc, t);
        const std::int64_t bytes = t.pixels * t.images * plan_.size;
        std::memset(static_cast<char*>(t.plane) + bytes, 0, std::size_t(round_up(bytes, kLine) - bytes));
    }

    // Planes of the channels that any of [begin, end) keeps, and zeros for their gradients.
    void load_x(std::int64_t begin, std::int64_t end) {
        for (std::int64_t c = 0; c < op_.channels; ++c) {
            bool kept = false;
            for (std::int64_t p = begin; p < end && !kept; ++p) kept = keeps(p, c);
            keeps_[std::size_t(c)] = kept;
            if (!kept) continue;
            if (op_.grad_weight)
                load(transfer(op_.x, op_.dtype, op_.shared ? 0 : begin, c, op_.channels, plan_.in_pixels,
                              x_ + c * in_step_));
            if (op_.grad_x) std::memset(grad_x_ + c * in_step_, 0, std::size_t(in_step_));
        }
    }
    void store_x(char* outer, DType dtype, std::int64_t p) const {
        if (!op_.grad_x) return;
        for (std::int64_t c = 0; c < op_.channels; ++c)
            if (keeps_[std::size_t(c)])
                plane_store(op_.acc, transfer(outer, dtype, p, c, op_.channels, plan_.in_pixels,
                                              grad_x_ + c * in_step_));
    }

    void individual(std::int64_t p) {
        poll();
        const std::int64_t ins = op_.channels / op_.groups, outs = op_.outputs / op_.groups;
        PlaneGradients q{};
        static_cast<Window<std::int64_t>&>(q) = op_;
        for (int k = 0; k < 2; ++k) q.readers[k] = plan_.axes[k].readers();
        q.images = images(), q.row = plan_.row, q.packed = packed_;
        for (std::int64_t g = 0; g < op_.groups; ++g) {
            in_.clear(), out_.clear(), in_planes_.clear(), out_planes_.clear(), grad_planes_.clear();
            for (std::int64_t c = 0; c < ins; ++c) {
                if (!keeps(p, g * ins + c)) continue;
                in_.push_back(std::int32_t(c));
                in_planes_.push_back(x_ + (g * ins + c) * in_step_);
                grad_planes_.push_back(grad_x_ + (g * ins + c) * in_step_);
            }
            for (std::int64_t o = g * outs; o < (g + 1) * outs; ++o) {
                if (!makes(p, o)) continue;
                char* plane = grad_ + o * out_step_;
                load(transfer(op_.grad, op_.dtype, p, o, op_.outputs, plan_.out_pixels, plane));
                if (op_.grad_bias)
                    plane_sum(op_.acc, {plan_.out_pixels * q.images, plane, bias_ + o * plan_.size});
                out_.push_back(std::int32_t(o));
                out_planes_.push_back(plane);
            }
            if (in_.empty() || out_.empty()) continue;
            q.inputs = std::int64_t(in_.size()), q.outputs = std::int64_t(out_.size());
            q.in = in_.data(), q.out = out_.data();
            q.x = in_planes_.data(), q.grad = out_planes_.data(), q.grad_x = grad_planes_.data();
            q.weight = op_.weight, q.grad_weight = weight_;
            if (op_.grad_x) plane_grad_input(op_.acc, q);
            if (op_.grad_weight) plane_grad_weight(op_.acc, q);
        }
    }

    Plan& plan_;
    const ConvBackward& op_;
    std::int64_t in_step_, out_step_, block_ = 0;
    Buffer buffer_;
    char *x_, *grad_x_, *grad_, *packed_;
    char *weight_ = nullptr, *bias_ = nullptr;
    std::vector<char> keeps_;
    std::vector<std::int32_t> in_, out_;
    std::vector<const void*> in_planes_, out_planes_;
    std::vector<void*> grad_planes_;
};

}  // namespace

void conv_backward(const ConvBackward& op, int threads) {
    if (!op.individuals || !op.images) return;
    Plan plan(op);
    const std::int64_t tasks = plan.cuts * plan.ranges;
    const std::int64_t work = op.individuals * op.images * plan.out_pixels * plan.row * op.outputs;
    threads = int(std::min<std::int64_t>(threads_for(work / 8, threads), tasks));
    std::vector<std::unique_ptr<Worker>> workers;
    for (int k = 0; k < threads; ++k) workers.push_back(std::make_unique<Worker>(plan));
    std::atomic<std::int64_t> next = 0;
    parallel_for(threads, threads, [&](std::int64_t k) {
        for (std::int64_t task = next++; task < tasks; task = next++) (*workers[std::size_t(k)])(task);
    });
    dispatch_acc(op.acc, [&](auto tag) {
        using A = typename decltype(tag)::type;
        add<A>(op.grad_x, plan.x_partial.get(), plan.ranges - 1, plan.numbers_x, threads);
        add<A>(op.grad_weight, plan.grad_weight(1), tasks - 1, plan.numbers_weight, threads);
        add<A>(op.grad_bias, plan.grad_bias(1), tasks - 1, plan.numbers_bias, threads);
    });
}

}  // namespace fastkd::cpu
