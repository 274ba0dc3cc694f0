// What an execution plans for a convolution: one matrix product for every group of individuals and every
// group of channels.
#include "network/cuda/execution.cuh"

namespace fastkd::cuda {

struct Execution::Convolution {
    Lists lists;
    Batch<MapTask> copies;  // of channels that do not lie side by side
    Batch<PackTask> packs;  // each packs the weights of the task at the same place
    std::vector<ConvTask> tasks;
    std::int64_t packed_bytes = 0;
};

// What `columns` of v are to these individuals, side by side: as it lies, or as a copy. The view itself is
// copied, since the list of views grows.
View Execution::side_by_side(int v, Range g, const std::vector<Column>& columns, Convolution& plan) {
    auto is = [&](const View& w) {
        if (w.begin > g.begin || g.end > w.end || w.at.empty()) return false;
        std::size_t there = 0;
        for (std::int32_t c : w.at) there += c >= 0;
        return there == columns.size();
    };
    for (const View& w : live_[std::size_t(v)])
        if (is(w)) return w;
    const View& from = view(v, g);
    View copy = std::move(allocate(v, {g}, {columns})[0]);
    add_map(plan.copies, plan.lists, copy, rows(v), columns, read(v, from, columns), nullptr);
    live_[std::size_t(v)].push_back(copy);
    return copy;
}

// What of a pixel's channels a group of channels reads.
struct Execution::Inputs {
    std::size_t from, to;                // positions of the pixel
    std::vector<std::int32_t> channels;  // of the group, at each position, padded; -1 for a zero
};

Execution::Inputs Execution::inputs_of(const View& x, const std::vector<Column>& inputs, const Node& node,
                                       std::int64_t group) const {
    const std::int64_t each = value(node.inputs[0]).channels / node.groups;
    Inputs in{0, x.at.size(), {}};
    if (node.groups > 1) {
        in.to = inputs.size();
        while (in.from < in.to && inputs[in.from].channel < group * each) ++in.from;
        while (in.to > in.from && inputs[in.to - 1].channel >= (group + 1) * each) --in.to;
    }
    for (std::size_t p = in.from; p < in.to; ++p)
        in.channels.push_back(x.at[p] < 0 ? -1 : std::int32_t(x.at[p] - group * each));
    in.channels.resize(std::size_t(pitch_of(in.channels.size())), -1);
    return in;
}

// The products of the individuals g, one for every group of channels.
void Execution::plan_products(const Step& step, Range g, const std::vector<Column>& outputs, const View& out,
                              Convolution& plan) {
    const Node& node = step.node;
    const int input = node.inputs[0];
    const std::int64_t group_out = value(node.output).channels / node.groups;
    const auto inputs = sorted_.wanted(input, g.begin, g.end);
    const View x = side_by_side(input, g, inputs, plan);
    for (std::size_t first = 0, last = 0; first < outputs.size(); first = last) {
        const std::int64_t group = outputs[first].channel / group_out;
        while (last < outputs.size() && outputs[last].channel / group_out == group) ++last;
        const Inputs in = inputs_of(x, inputs, node, group);
        const std::vector<Column> columns(outputs.begin() + std::ptrdiff_t(first),
                                          outputs.begin() + std::ptrdiff_t(last));
        ConvTask t{};
        t.in = static_cast<const char*>(x.data) + std::int64_t(in.from) * size_;
        t.in_pitch = std::int64_t(x.at.size());
        t.inputs = int(in.to - in.from), t.positions = int(in.channels.size());
        t.depth = round_up(node.kernel[0] * node.kernel[1] * t.positions, kChunkBytes / size_);
        t.columns = plan.lists.add(numbered(columns));
        t.residual = kNone;
        if (step.residual >= 0)
            t.residual = plan.lists.add(read(step.residual, view(step.residual, g), columns));
        t.out = static_cast<char*>(const_cast<void*>(out.data)) + std::int64_t(first) * size_;
        t.out_pitch = int(out.at.size());
        t.outputs = int(columns.size());
        t.width = last == outputs.size() ? t.out_pitch - int(first) : t.outputs;
        plan.tasks.push_back(t);

        PackTask p{};
        p.channels = plan.lists.add(in.channels), p.columns = t.columns;
        p.outputs = t.outputs, p.positions = t.positions, p.depth = t.depth;
        p.packed = reinterpret_cast<void*>(plan.packed_bytes);  // a distance, until there is memory
        plan.packed_bytes += round_up(p.outputs * p.depth * size_, kAlign);
        plan.packs.add(p, ceil_div(p.outputs * p.depth, kPackElements));
    }
}

void Execution::conv(const Step& step, const Groups& groups, const Columns& columns,
                     const std::vector<View>& views) {
    Convolution plan;
    for (std::size_t g = 0; g < groups.size(); ++g)
        if (!columns[g].empty()) plan_products(step, groups[g], columns[g], views[g], plan);
    if (plan.tasks.empty()) return;
    const Buffer packed(memory_, plan.packed_bytes);
    std::int64_t width = 0;
    for (const ConvTask& t : plan.tasks) width += t.width;
    const int tile = conv_tile(program_.dtype, tf32_, double(width) / double(plan.tasks.size()));
    Batch<ConvTask> products;
    for (std::size_t k = 0; k < plan.tasks.size(); ++k) {
        PackTask& p = plan.packs.tasks[k];
        p.packed = packed.data + reinterpret_cast<std::intptr_t>(p.packed);
        plan.tasks[k].packed = p.packed;
        products.add(plan.tasks[k], conv_tiles(plan.tasks[k], rows(step.node.output), tile));
    }
    launch_conv(step, plan, products, tile);
}

void Execution::launch_conv(const Step& step, Convolution& plan, const Batch<ConvTask>& products, int tile) {
    const Node& node = step.node;
    const std::int64_t taps = node.kernel[0] * node.kernel[1];
    MapLayer copy{};
    plan.copies.list(copy, plan.lists);
    copy.rows = rows(node.inputs[0]);
    PackLayer packing{};
    plan.packs.list(packing, plan.lists);
    packing.weight = node.weight, packing.taps = int(taps);
    packing.row = value(node.inputs[0]).channels / node.groups * taps;
    ConvLayer layer{};
    products.list(layer, plan.lists);
    layer.window = window(node), layer.aligned = node.groups == 1;
    layer.affine = affine(step), layer.activation = step.activation, layer.param = step.param;
    const Buffer device(memory_, plan.lists.bytes());
    copy.lists = packing.lists = layer.lists = device.data;
    pointwise(program_.dtype, copy, plan.copies.blocks, stream_);
    pack(program_.dtype, packing, plan.packs.blocks, stream_);
    cuda::conv(program_.dtype, layer, tile, tf32_, products.blocks, stream_);
}

}  // namespace fastkd::cuda
