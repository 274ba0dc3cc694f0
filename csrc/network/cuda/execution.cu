// How an execution goes from step to step: groups of individuals, their views, lists of channels, input and
// result.
#include "network/cuda/execution.cuh"

namespace fastkd::cuda {

Execution::Execution(const Program& program, const NetworkRun& run, bool tf32, Memory& memory, void* stream)
    : program_(program),
      s_(program.schedule(run)),
      run_(run),
      tf32_(tf32),
      memory_(memory),
      stream_(stream),
      size_(size_of(program.dtype)),
      pad_(kPadBytes / size_),
      sorted_(program, s_, run.masks, run.individuals),
      live_(program.values.size()),
      cut_(std::size_t(run.individuals), run.x_stride != 0) {}

void Execution::operator()() {
    load();
    const std::size_t last = run_.out ? s_.steps.size() : s_.measured;
    for (std::size_t k = 0; k < last; ++k) {
        execute(s_.steps[k]);
        for (int v : s_.steps[k].dying) live_[std::size_t(v)].clear();
    }
    if (run_.out) store();
}

void Execution::execute(const Step& step) {
    const Node& node = step.node;
    const Groups groups = this->groups(step);
    if (node.kind == Operation::select) return select(node, groups);
    if (node.kind == Operation::flatten) return flatten(node, groups);
    Columns columns;
    for (const Range& g : groups) columns.push_back(sorted_.wanted(node.output, g.begin, g.end));
    auto views = allocate(node.output, groups, columns);
    if (program_.by_channel(node)) maps(step, groups, columns, views);
    else conv(step, groups, columns, views);
    live_[std::size_t(node.output)] = std::move(views);
}

// Neighbours that share a step. Those that parted before stay apart.
Groups Execution::groups(const Step& step) {
    const bool apart =
        step.norm >= 0 && run_.affines && run_.affines[step.norm].stride && !run_.affines_agree;
    for (std::size_t k = 0; k < cut_.size(); ++k) cut_[k] = cut_[k] || apart || sorted_.agree[k] < step.seen;
    return parts();
}

Groups Execution::parts() const {
    Groups groups;
    for (std::int64_t k = 0; k < run_.individuals; ++k) {
        if (k == 0 || cut_[std::size_t(k)]) groups.push_back({k, k});
        groups.back().end = k + 1;
    }
    return groups;
}

// New planes for these channels, one view per group, in one piece of memory.
std::vector<View> Execution::allocate(int v, const Groups& groups, const Columns& columns) const {
    const std::int64_t pixels = rows(v);
    std::int64_t bytes = 0;
    for (const auto& c : columns) bytes += round_up(pixels * pitch_of(c.size()) * size_, kAlign);
    const auto buffer = std::make_shared<Buffer>(memory_, bytes);
    char* next = buffer->data;
    std::vector<View> views;
    for (std::size_t g = 0; g < groups.size(); ++g) {
        const std::int64_t pitch = pitch_of(columns[g].size());
        View w{groups[g].begin, groups[g].end, {}, {buffer}, {}, next};
        w.channels.assign(std::size_t(value(v).channels), {nullptr, 0});
        w.at.assign(std::size_t(pitch), -1);
        for (std::size_t j = 0; j < columns[g].size(); ++j) {
            w.channels[std::size_t(columns[g][j].channel)] = {next + std::int64_t(j) * size_, pitch};
            w.at[j] = columns[g][j].channel;
        }
        views.push_back(std::move(w));
        next += round_up(pixels * pitch * size_, kAlign);
    }
    return views;
}

// --- lists of channels ----------------------------------------------------------------------------

// The view of a value made of others without work; its channels come one by one from source(group, channel).
template <class Source> void Execution::spread(const Node& node, const Groups& groups, Source source) {
    for (const Range& g : groups) {
        View w{g.begin, g.end, {}, {}, {}, nullptr};
        w.channels.assign(std::size_t(value(node.output).channels), {nullptr, 0});
        for (int v : node.inputs)
            for (const Owner& owner : view(v, g).owners) w.owners.push_back(owner);
        for (const Column& c : sorted_.wanted(node.output, g.begin, g.end))
            w.channels[std::size_t(c.channel)] = source(g, c.channel);
        live_[std::size_t(node.output)].push_back(std::move(w));
    }
}

void Execution::select(const Node& node, const Groups& groups) {
    spread(node, groups, [&](Range g, std::int64_t c) {
        const std::int32_t input = node.select[std::size_t(2 * c)];
        if (input < 0) return Channel{nullptr, 0};
        return view(node.inputs[std::size_t(input)], g)
            .channels[std::size_t(node.select[std::size_t(2 * c + 1)])];
    });
}

void Execution::flatten(const Node& node, const Groups& groups) {
    const Value& in = value(node.inputs[0]);
    const std::int64_t pixels = in.height * in.width;
    spread(node, groups, [&](Range g, std::int64_t c) {
        const Channel& from = view(node.inputs[0], g).channels[std::size_t(c / pixels)];
        if (!from.data) return Channel{nullptr, 0};
        return Channel{static_cast<const char*>(from.data) + c % pixels * from.pitch * size_,
                       from.pitch * pixels};
    });
}

// --- in and out -----------------------------------------------------------------------------------

TransferLayer Execution::transfer(int v) const {
    const Value& shape = value(v);
    TransferLayer layer{};
    layer.images = run_.images, layer.pixels = shape.height * shape.width, layer.channels = shape.channels;
    return layer;
}

void Execution::load() {
    const Groups groups = parts();
    Columns columns;
    for (const Range& g : groups) columns.push_back(sorted_.wanted(0, g.begin, g.end));
    auto views = allocate(0, groups, columns);
    Lists lists;
    Batch<TransferTask> batch;
    for (std::size_t g = 0; g < groups.size(); ++g) {
        if (columns[g].empty()) continue;
        const char* x = static_cast<const char*>(run_.x);
        x += sorted_.individual[std::size_t(groups[g].begin)] * run_.x_stride * size_of(run_.x_dtype);
        TransferTask t{};
        t.outer = const_cast<char*>(x), t.columns = lists.add(columns[g]);
        t.out = const_cast<void*>(views[g].data);
        t.width = int(columns[g].size()), t.pitch = int(views[g].at.size());
        batch.add(t, ceil_div(rows(0), map_rows(t.pitch)));
    }
    TransferLayer layer = transfer(0);
    batch.list(layer, lists);
    const Buffer device(memory_, lists.bytes());
    layer.lists = device.data;
    cuda::load(program_.dtype, run_.x_dtype, layer, batch.blocks, stream_);
    live_[0] = std::move(views);
}

void Execution::store() {
    const int v = program_.output;
    const Value& shape = value(v);
    Lists lists;
    Batch<TransferTask> batch;
    for (std::int64_t k = 0; k < run_.individuals; ++k) {
        const View& w = view(v, {k, k + 1});
        std::vector<Channel> channels;
        for (std::int64_t c = 0; c < shape.channels; ++c) channels.push_back(seen_by(k, v, c, w));
        TransferTask t{};
        t.outer = static_cast<char*>(run_.out) +
                  sorted_.individual[std::size_t(k)] * rows(v) * shape.channels * size_of(run_.out_dtype);
        t.x = lists.add(channels);
        t.width = t.pitch = int(shape.channels);
        batch.add(t, ceil_div(rows(v), map_rows(t.pitch)));
    }
    TransferLayer layer = transfer(v);
    batch.list(layer, lists);
    const Buffer device(memory_, lists.bytes());
    layer.lists = device.data;
    cuda::store(program_.dtype, run_.out_dtype, layer, batch.blocks, stream_);
}

}  // namespace fastkd::cuda
