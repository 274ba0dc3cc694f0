// The layers of a walk: which planes an operation reads and writes.
#include <cmath>

#include "common/interrupt.h"
#include "network/cpu/walk.h"

namespace fastkd::cpu {

void Walk::execute(const Step& step, std::int64_t begin, std::int64_t end) {
    poll();
    const Node& node = step.node;
    const Task task{step, sorted_.wanted(node.output, begin, end), begin, end};
    if (!step.is_list()) allocate(node.output, task.columns);
    switch (node.kind) {
        case Operation::select:
            return select(task);
        case Operation::flatten:
            return flatten(node);
        case Operation::conv:
            return conv(task);
        case Operation::norm:
        case Operation::activation:
            return pointwise(task);
        case Operation::add:
            return add(task);
        case Operation::multiply:
            return multiply(task);
        case Operation::max_pool:
        case Operation::avg_pool:
            return pool(task);
    }
}

// --- convolutions ---------------------------------------------------------------------------------

void Walk::prepare(const Task& task) {
    const Node& node = task.step.node;
    const std::size_t n = task.columns.size();
    layer_.scale.resize(n * std::size_t(size_)), layer_.shift.resize(n * std::size_t(size_));
    layer_.inputs.clear(), layer_.outputs.clear(), layer_.groups.clear();
    dispatch_acc(program_.dtype, [&](auto tag) {
        using A = typename decltype(tag)::type;
        for (std::size_t j = 0; j < n; ++j) {
            const Column& c = task.columns[j];
            double a = 1, b = node.bias ? number(node.bias, c.channel) : 0;
            if (task.step.norm >= 0) {
                a = number(affine(task.step, c.keeper, false), c.channel);
                b = b * a + number(affine(task.step, c.keeper, true), c.channel);
            }
            reinterpret_cast<A*>(layer_.scale.data())[j] = A(a);
            reinterpret_cast<A*>(layer_.shift.data())[j] = A(b);
            layer_.outputs.push_back(c.channel);
        }
    });
    std::size_t bytes = 0;
    for (std::size_t j = 0; j < n;) j = prepare_group(task, j, bytes);
}

// Packs the weights of the columns from `first` on that are of the same group; returns the first that is not.
std::size_t Walk::prepare_group(const Task& task, std::size_t first, std::size_t& bytes) {
    const Node& node = task.step.node;
    const int input = node.inputs[0];
    const std::int64_t taps = node.kernel[0] * node.kernel[1];
    const std::int64_t group_in = value(input).channels / node.groups;
    const std::int64_t group_out = value(node.output).channels / node.groups;
    const std::int64_t group = layer_.outputs[first] / group_out;
    std::size_t last = first;
    while (last < layer_.outputs.size() && layer_.outputs[last] / group_out == group) ++last;
    within_.clear();
    for (std::int64_t c = 0; c < group_in; ++c)
        if (seen_by(task.begin, input, 0, group * group_in + c)) within_.push_back(std::int32_t(c));
    // Of a channel by itself, as in a depthwise convolution, the keepers may differ: it is read by those
    // that keep the output.
    if (group_in == 1 && within_.empty() && seen_by(task.columns[first].keeper, input, 0, group))
        within_.push_back(0);
    const std::int64_t outputs = std::int64_t(last - first), inputs = std::int64_t(within_.size());
    const std::size_t first_input = layer_.inputs.size(), packed = bytes;
    bytes += std::size_t(outputs * inputs * taps * size_);
    if (layer_.packed.size() < bytes) layer_.packed.resize(bytes);
    pack_weights(program_.dtype,
                 {node.weight, group_in * taps, taps, within_.data(), layer_.outputs.data() + first, inputs,
                  outputs, layer_.packed.data() + packed});
    for (std::int32_t c : within_) layer_.inputs.push_back(std::int32_t(group * group_in + c));
    layer_.groups.push_back({first, last, first_input, layer_.inputs.size(), packed});
    return last;
}

void Walk::conv(const Task& task) {
    prepare(task);
    const Step& step = task.step;
    const std::size_t size = std::size_t(size_);
    PlaneConv q{};
    static_cast<Window<std::int64_t>&>(q) = window_of<std::int64_t>(program_, step.node);
    for (std::int64_t b = 0; b < count_; ++b) {
        poll();
        in_planes_.clear(), out_planes_.clear(), residual_.clear();
        for (std::int32_t c : layer_.inputs) in_planes_.push_back(plane(step.node.inputs[0], b, c));
        for (const Column& c : task.columns) {
            out_planes_.push_back(plane(step.node.output, b, c.channel));
            if (step.residual >= 0) residual_.push_back(seen_by(c.keeper, step.residual, b, c.channel));
        }
        q.images = images(b);
        for (const auto& g : layer_.groups) {
            q.inputs = std::int64_t(g.last_input - g.first_input);
            q.outputs = std::int64_t(g.last - g.first);
            q.packed = layer_.packed.data() + g.packed;
            q.scale = layer_.scale.data() + g.first * size;
            q.shift = layer_.shift.data() + g.first * size;
            q.in = in_planes_.data() + g.first_input, q.out = out_planes_.data() + g.first;
            q.tail = {step.residual >= 0 ? residual_.data() + g.first : nullptr, step.activation, step.param};
            plane_conv(program_.dtype, q);
        }
    }
}

// --- channel by channel ---------------------------------------------------------------------------

// A norm or an activation.
void Walk::pointwise(const Task& task) {
    const Step& step = task.step;
    const int input = step.node.inputs[0], output = step.node.output;
    const std::int64_t pixels = value(output).height * value(output).width;
    for (const Column& c : task.columns) {
        const Line l = step.node.kind == Operation::norm ? line(task, c) : Line{1, 0};
        for (std::int64_t b = 0; b < count_; ++b) {
            const void* residual =
                step.residual >= 0 ? seen_by(c.keeper, step.residual, b, c.channel) : nullptr;
            const Tail tail{residual ? &residual : nullptr, step.activation, step.param};
            plane_pointwise(program_.dtype, {pixels, images(b), seen_by(c.keeper, input, b, c.channel),
                                             l.scale, l.shift, tail, plane(output, b, c.channel)});
        }
    }
}

Walk::Line Walk::line(const Task& task, const Column& c) const {
    if (run_.moments && task.step.node.batch) return measured_line(task, c);
    return {number(affine(task.step, c.keeper, false), c.channel),
            number(affine(task.step, c.keeper, true), c.channel)};
}

// The moments of the batch, stated to all that keep the channel, and the line that normalises it.
Walk::Line Walk::measured_line(const Task& task, const Column& c) const {
    const Node& node = task.step.node;
    const Value& shape = value(node.output);
    double mean = 0, variance = 0;
    if (seen_by(c.keeper, node.inputs[0], 0, c.channel)) {
        mean = moment(node.inputs[0], c.channel, 0, 1);
        variance = moment(node.inputs[0], c.channel, mean, 2);
    }
    const Moments& out = run_.moments[task.step.norm];
    for (std::int64_t k = task.begin; k < task.end; ++k) {
        if (!sorted_.kept(k, shape.genes[std::size_t(c.channel)])) continue;
        const std::int64_t at = sorted_.individual[std::size_t(k)] * shape.channels + c.channel;
        static_cast<double*>(out.mean)[at] = mean;
        static_cast<double*>(out.variance)[at] = variance;
    }
    const double scale =
        (node.weight ? number(node.weight, c.channel) : 1) / std::sqrt(variance + node.param);
    return {scale, (node.bias ? number(node.bias, c.channel) : 0) - mean * scale};
}

// The mean of (x - mean)^power over the batch: images in order, whatever the blocks.
double Walk::moment(int v, std::int64_t c, double mean, int power) const {
    const std::int64_t pixels = value(v).height * value(v).width;
    double total = 0, sums[kMostLines * kLine / 4];
    for (std::int64_t b = 0; b < count_; ++b) {
        plane_moment(program_.dtype, {pixels, images(b), plane(v, b, c), mean, power, sums});
        for (std::int64_t n = 0; n < blocks_.valid(first_ + b); ++n) total += sums[n];
    }
    return total / double(blocks_.images * pixels);
}

void Walk::add(const Task& task) {
    const Step& step = task.step;
    const auto& inputs = step.node.inputs;
    const Value& shape = value(step.node.output);
    for (const Column& c : task.columns)
        for (std::int64_t b = 0; b < count_; ++b) {
            void* out = plane(step.node.output, b, c.channel);
            const void* sum = seen_by(c.keeper, inputs[0], b, c.channel);
            for (std::size_t i = 1; i < inputs.size(); ++i) {
                const void* x = seen_by(c.keeper, inputs[i], b, c.channel);
                const bool last = i + 1 == inputs.size();
                const Tail tail{x ? &x : nullptr, last ? step.activation : Activation::none, step.param};
                plane_pointwise(program_.dtype,
                                {shape.height * shape.width, images(b), sum, 1, 0, tail, out});
                sum = out;
            }
        }
}

void Walk::multiply(const Task& task) {
    const Node& node = task.step.node;
    const Value &shape = value(node.output), &gate = value(node.inputs[1]);
    const std::int64_t pixels = shape.height * shape.width;
    const bool broadcast = gate.height * gate.width != pixels;
    for (const Column& c : task.columns)
        for (std::int64_t b = 0; b < count_; ++b) {
            const void* x = seen_by(c.keeper, node.inputs[0], b, c.channel);
            const void* g = seen_by(c.keeper, node.inputs[1], b, c.channel);
            if (!x || !g) zero(node.output, b, c.channel);
            else
                plane_product(program_.dtype,
                              {pixels, images(b), x, g, broadcast, plane(node.output, b, c.channel)});
        }
}

void Walk::pool(const Task& task) {
    const Node& node = task.step.node;
    PlanePool q{};
    static_cast<Window<std::int64_t>&>(q) = window_of<std::int64_t>(program_, node);
    q.max = node.kind == Operation::max_pool, q.count_padding = node.count_padding;
    for (const Column& c : task.columns)
        for (std::int64_t b = 0; b < count_; ++b) {
            q.images = images(b);
            q.in = seen_by(c.keeper, node.inputs[0], b, c.channel);
            q.out = plane(node.output, b, c.channel);
            if (q.in) plane_pool(program_.dtype, q);
            else zero(node.output, b, c.channel);
        }
}

void Walk::zero(int v, std::int64_t b, std::int64_t c) const {
    const Tail tail{nullptr, Activation::none, 0};
    plane_pointwise(program_.dtype,
                    {value(v).height * value(v).width, images(b), nullptr, 1, 0, tail, plane(v, b, c)});
}

}  // namespace fastkd::cpu
