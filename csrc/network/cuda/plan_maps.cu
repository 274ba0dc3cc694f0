// What an execution plans for layers that work channel by channel, and for the moments of a batch.
#include "network/cuda/execution.cuh"

namespace fastkd::cuda {

AffineOf Execution::affine(const Step& step) const {
    AffineOf f{};
    if (step.node.kind == Operation::conv) f.bias = step.node.bias;
    if (step.norm < 0) return f;
    const Node& n = *step.affine;
    f.channels = value(n.output).channels;
    if (run_.moments && n.batch) {
        f.mean = static_cast<const double*>(run_.moments[step.norm].mean);
        f.variance = static_cast<const double*>(run_.moments[step.norm].variance);
        f.eps = n.param, f.weight = n.weight, f.offset = n.bias;
        return f;
    }
    const Affine a = affine_of(run_, step);
    f.scale = a.scale, f.shift = a.shift, f.stride = a.stride;
    return f;
}

ImageWindow Execution::window(const Node& node) const {
    ImageWindow w{};
    static_cast<Window<int>&>(w) = window_of<int>(program_, node);
    w.images = run_.images;
    return w;
}

// One group's part of a layer; `other` may be null.
void Execution::add_map(Maps& maps, Lists& lists, const View& out, std::int64_t pixels,
                        const std::vector<Column>& columns, const std::vector<Channel>& x,
                        const std::vector<Channel>* other) const {
    if (columns.empty()) return;
    MapTask t{};
    t.x = lists.add(x), t.other = other ? lists.add(*other) : kNone;
    t.columns = lists.add(numbered(columns));
    t.out = const_cast<void*>(out.data);
    t.outputs = int(columns.size()), t.pitch = int(out.at.size());
    maps.add(t, ceil_div(pixels, map_rows(t.pitch)));
}

void Execution::maps(const Step& step, const Groups& groups, const Columns& columns,
                     const std::vector<View>& views) {
    const Node& node = step.node;
    const std::int64_t pixels = rows(node.output);
    if (run_.moments && node.kind == Operation::norm && node.batch) measure(step, groups, columns);
    // A sum of more than two takes its inputs one by one.
    const std::size_t passes = node.kind == Operation::add ? node.inputs.size() - 1 : 1;
    for (std::size_t pass = 0; pass < passes; ++pass) {
        int second = step.residual;
        if (node.kind == Operation::add) second = node.inputs[pass + 1];
        if (node.kind == Operation::multiply) second = node.inputs[1];
        Lists lists;
        Maps maps;
        for (std::size_t g = 0; g < groups.size(); ++g) {
            const auto x = pass > 0 ? read(node.output, views[g], columns[g])
                                    : read(node.inputs[0], view(node.inputs[0], groups[g]), columns[g]);
            std::vector<Channel> other;
            if (second >= 0) other = read(second, view(second, groups[g]), columns[g]);
            add_map(maps, lists, views[g], pixels, columns[g], x, second >= 0 ? &other : nullptr);
        }
        MapLayer layer{};
        maps.list(layer, lists);
        layer.rows = pixels, layer.affine = affine(step);
        if (pass + 1 == passes) layer.activation = step.activation, layer.param = step.param;
        const Buffer device(memory_, lists.bytes());
        layer.lists = device.data;
        launch_maps(node, layer, maps.blocks);
    }
}

void Execution::launch_maps(const Node& node, const MapLayer& layer, std::int64_t blocks) const {
    const DType dtype = program_.dtype;
    switch (node.kind) {
        case Operation::conv:
            return depthwise(dtype, layer, window(node), node.weight, blocks, stream_);
        case Operation::multiply: {
            const Value &out = value(node.output), &gate = value(node.inputs[1]);
            return product(dtype, layer, out.height * out.width, gate.height * gate.width, blocks, stream_);
        }
        case Operation::max_pool:
        case Operation::avg_pool:
            return pool(dtype, layer, window(node), node.kind == Operation::max_pool, node.count_padding,
                        blocks, stream_);
        default:
            return pointwise(dtype, layer, blocks, stream_);
    }
}

// Mean, then variance, of every channel that reaches a norm; into the rows of all that keep it.
void Execution::measure(const Step& step, const Groups& groups, const Columns& columns) {
    const Node& node = step.node;
    const auto& genes = value(node.output).genes;
    Lists lists;
    Batch<MomentTask> batch;
    std::vector<MomentEntry> entries;
    const std::int64_t pixels = rows(node.output), pieces = ceil_div(pixels, kPiece);
    std::int64_t total = 0;
    for (const auto& c : columns) total += std::int64_t(c.size()) * pieces;
    const Buffer partial(memory_, total * std::int64_t(sizeof(double)));
    auto* next = reinterpret_cast<double*>(partial.data);
    for (std::size_t g = 0; g < groups.size(); ++g) {
        const auto& list = columns[g];
        if (list.empty()) continue;
        for (std::size_t j = 0; j < list.size(); ++j)
            for (std::int64_t k = groups[g].begin; k < groups[g].end; ++k)
                if (sorted_.kept(k, genes[std::size_t(list[j].channel)]))
                    entries.push_back({std::int32_t(batch.tasks.size()), std::int32_t(j),
                                       std::int32_t(sorted_.individual[std::size_t(k)]), list[j].channel});
        MomentTask t{};
        t.x = lists.add(read(node.inputs[0], view(node.inputs[0], groups[g]), list));
        t.columns = lists.add(numbered(list));
        t.partial = next, t.width = int(list.size());
        batch.add(t, pieces);
        next += std::int64_t(list.size()) * pieces;
    }
    MomentLayer layer{};
    batch.list(layer, lists);
    layer.entries = lists.add(entries), layer.num_entries = std::int64_t(entries.size());
    layer.rows = pixels;
    layer.mean = static_cast<double*>(run_.moments[step.norm].mean);
    layer.variance = static_cast<double*>(run_.moments[step.norm].variance);
    layer.channels = value(node.output).channels;
    const Buffer device(memory_, lists.bytes());
    layer.lists = device.data;
    for (layer.power = 1; layer.power <= 2; ++layer.power)
        moments(layer, program_.dtype, batch.blocks, stream_);
}

}  // namespace fastkd::cuda
