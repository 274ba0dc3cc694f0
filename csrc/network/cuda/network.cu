// A whole population through one network on the GPU: layer by layer, all individuals at once.
//
// The host plans: individuals are sorted as on the CPU, neighbours that agree on what a layer depends on
// form a group, and a layer is one launch over all groups. A group computes the channels that any of its
// individuals keeps. Where a group parts, a convolution first copies the channels that each part keeps
// side by side; all other layers reach every channel by its own address. The order of channels in memory,
// and with it that of every sum, depends on the individual's own mask alone.
#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>

#include "network/cuda/maps.cuh"
#include "network/schedule.h"

namespace fastkd::cuda {
namespace {

constexpr std::int64_t kAlign = 256;

std::int64_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }
std::int64_t round_up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }

struct Buffer {
    Buffer(Memory& memory, std::int64_t bytes)
        : memory(memory), data(static_cast<char*>(memory.take(std::max(bytes, kAlign)))) {}
    Buffer(Memory& memory, const std::vector<char>& host)
        : memory(memory), data(static_cast<char*>(memory.put(host.data(), std::int64_t(host.size())))) {}
    ~Buffer() { memory.give(data); }
    Buffer(const Buffer&) = delete;
    Memory& memory;
    char* data;
};
using Owner = std::shared_ptr<Buffer>;

// Tasks and their lists on their way to the device.
class Lists {
  public:
    template <class T> std::int64_t add(const std::vector<T>& list) {
        const std::size_t at = std::size_t(round_up(std::int64_t(bytes_.size()), 16));
        bytes_.resize(at + std::max<std::size_t>(list.size() * sizeof(T), 1));
        if (!list.empty()) std::memcpy(bytes_.data() + at, list.data(), list.size() * sizeof(T));
        return std::int64_t(at);
    }
    const std::vector<char>& bytes() const { return bytes_; }

  private:
    std::vector<char> bytes_;
};

// A value as some neighbours have it.
struct View {
    std::int64_t begin, end;        // individuals, as they are sorted
    std::vector<Channel> channels;  // [channels of the value], null where it does not exist
    std::vector<Owner> owners;
    // Of pixels that lie side by side: the channel at every position of one, or -1 for a zero. Empty
    // where channels are spread.
    std::vector<std::int32_t> at;
    const void* data = nullptr;
};

struct Range {
    std::int64_t begin, end;
};

class Execution {
  public:
    Execution(const Program& program, const NetworkRun& run, bool tf32, Memory& memory, void* stream)
        : program_(program),
          s_(run.moments ? program.recalibrate : program.inherit),
          run_(run),
          tf32_(tf32),
          memory_(memory),
          stream_(stream),
          size_(size_of(program.dtype)),
          pad_(kPadBytes / size_),
          sorted_(program, s_, run.masks, run.individuals),
          live_(program.values.size()),
          cut_(std::size_t(run.individuals), run.x_stride != 0) {}

    void operator()() {
        load();
        const std::size_t last = run_.out ? s_.steps.size() : s_.measured;
        for (std::size_t k = 0; k < last; ++k) {
            const Step& step = s_.steps[k];
            execute(step, groups(step));
            for (int v : step.dying) live_[std::size_t(v)].clear();
        }
        if (run_.out) store();
    }

  private:
    const Value& value(int v) const { return program_.values[std::size_t(v)]; }
    std::int64_t rows(int v) const { return run_.images * value(v).height * value(v).width; }
    bool kept(std::int64_t k, std::int32_t gene) const {
        return program_.kept(run_.masks + sorted_.individual[std::size_t(k)] * program_.genes, gene);
    }

    // Neighbours that share a step. Those that parted before stay apart.
    std::vector<Range> groups(const Step& step) {
        const bool own =
            step.norm >= 0 && run_.affines && run_.affines[step.norm].stride && !run_.affines_agree;
        for (std::size_t k = 0; k < cut_.size(); ++k)
            cut_[k] = cut_[k] || own || sorted_.agree[k] < step.seen;
        return parts();
    }
    std::vector<Range> parts() const {
        std::vector<Range> ranges;
        for (std::int64_t k = 0; k < run_.individuals; ++k) {
            if (k == 0 || cut_[std::size_t(k)]) ranges.push_back({k, k});
            ranges.back().end = k + 1;
        }
        return ranges;
    }

    // Channels that some of them keep, each with the first that does.
    std::vector<Column> wanted(int v, Range g) const {
        std::vector<Column> columns;
        const auto& genes = value(v).genes;
        for (std::size_t c = 0; c < genes.size(); ++c)
            for (std::int64_t k = g.begin; k < g.end; ++k)
                if (kept(k, genes[c])) {
                    columns.push_back({std::int32_t(c), std::int32_t(k)});
                    break;
                }
        return columns;
    }

    const View& view(int v, Range g) const {
        for (const View& w : live_[std::size_t(v)])
            if (w.begin <= g.begin && g.end <= w.end) return w;
        throw std::logic_error("network: a value is read after its end");
    }
    // Channel c of v as an individual sees it.
    Channel seen_by(std::int64_t k, int v, std::int64_t c, const View& w) const {
        return kept(k, value(v).genes[std::size_t(c)]) ? w.channels[std::size_t(c)] : Channel{nullptr, 0};
    }
    // Of the columns of a result, what they read of v.
    std::vector<Channel> read(int v, const View& w, const std::vector<Column>& columns) const {
        std::vector<Channel> list;
        for (const Column& c : columns) list.push_back(seen_by(c.keeper, v, c.channel, w));
        return list;
    }
    // The device knows individuals by their own numbers.
    std::vector<Column> numbered(std::vector<Column> columns) const {
        for (Column& c : columns) c.keeper = std::int32_t(sorted_.individual[std::size_t(c.keeper)]);
        return columns;
    }

    std::int64_t pitch_of(std::size_t channels) const { return round_up(std::int64_t(channels), pad_); }

    // New planes for these channels, one view per group, in one piece of memory.
    std::vector<View> allocate(int v, const std::vector<Range>& ranges,
                               const std::vector<std::vector<Column>>& columns) const {
        const std::int64_t pixels = rows(v);
        std::int64_t bytes = 0;
        for (const auto& c : columns) bytes += round_up(pixels * pitch_of(c.size()) * size_, kAlign);
        const auto buffer = std::make_shared<Buffer>(memory_, bytes);
        char* next = buffer->data;
        std::vector<View> views;
        for (std::size_t g = 0; g < ranges.size(); ++g) {
            const std::int64_t pitch = pitch_of(columns[g].size());
            View w{ranges[g].begin, ranges[g].end, {}, {buffer}, {}, next};
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

    AffineOf affine(const Step& step) const {
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
        const Affine* given = run_.affines ? &run_.affines[step.norm] : nullptr;
        const bool own = !given || !given->scale;
        f.scale = own ? n.scale : given->scale, f.shift = own ? n.shift : given->shift;
        f.stride = own ? 0 : given->stride;
        return f;
    }

    Window window(const Node& node) const {
        const Value &in = value(node.inputs[0]), &out = value(node.output);
        Window w{};
        w.images = run_.images;
        for (int axis = 0; axis < 2; ++axis) {
            w.size[axis] = int(axis ? in.width : in.height);
            w.out_size[axis] = int(axis ? out.width : out.height);
            w.kernel[axis] = int(node.kernel[axis]), w.stride[axis] = int(node.stride[axis]);
            w.padding[axis] = int(node.padding[axis]), w.dilation[axis] = int(node.dilation[axis]);
        }
        return w;
    }

    void execute(const Step& step, const std::vector<Range>& ranges) {
        const Node& node = step.node;
        if (node.kind == Operation::select) return select(node, ranges);
        if (node.kind == Operation::flatten) return flatten(node, ranges);
        std::vector<std::vector<Column>> columns;
        for (const Range& g : ranges) columns.push_back(wanted(node.output, g));
        auto views = allocate(node.output, ranges, columns);
        if (node.kind == Operation::conv &&
            !(node.groups > 0 && by_channel(node, value(node.inputs[0]), value(node.output))))
            conv(step, ranges, columns, views);
        else maps(step, ranges, columns, views);
        live_[std::size_t(node.output)] = std::move(views);
    }

    // --- channel by channel ---------------------------------------------------------------------------

    struct Maps {
        std::vector<MapTask> tasks;
        std::int64_t blocks = 0;
    };

    void add_map(Maps& maps, Lists& lists, const View& out, std::int64_t pixels,
                 const std::vector<Column>& columns, const std::vector<Channel>& x,
                 const std::vector<Channel>* other) const {
        if (columns.empty()) return;
        MapTask t{};
        t.first = maps.blocks;
        t.x = lists.add(x), t.other = other ? lists.add(*other) : kNone;
        t.columns = lists.add(numbered(columns));
        t.out = const_cast<void*>(out.data);
        t.outputs = int(columns.size()), t.pitch = int(out.at.size());
        maps.blocks += ceil_div(pixels, map_rows(t.pitch));
        maps.tasks.push_back(t);
    }
    MapLayer layer_of(const Maps& maps, Lists& lists, std::int64_t pixels) const {
        MapLayer layer{};
        layer.tasks = lists.add(maps.tasks), layer.count = int(maps.tasks.size()), layer.rows = pixels;
        return layer;
    }

    void maps(const Step& step, const std::vector<Range>& ranges,
              const std::vector<std::vector<Column>>& columns, const std::vector<View>& views) {
        const Node& node = step.node;
        const std::int64_t pixels = rows(node.output);
        if (run_.moments && node.kind == Operation::norm && node.batch) measure(step, ranges, columns);
        // A sum of more than two takes its inputs one by one.
        const std::size_t passes = node.kind == Operation::add ? node.inputs.size() - 1 : 1;
        for (std::size_t pass = 0; pass < passes; ++pass) {
            Lists lists;
            Maps maps;
            for (std::size_t g = 0; g < ranges.size(); ++g) {
                const auto& own = columns[g];
                const bool again = pass > 0;
                const int first = again ? node.output : node.inputs[0];
                int second = step.residual;
                if (node.kind == Operation::add) second = node.inputs[pass + 1];
                if (node.kind == Operation::multiply) second = node.inputs[1];
                const auto x = read(first, again ? views[g] : view(first, ranges[g]), own);
                const auto other =
                    second >= 0 ? read(second, view(second, ranges[g]), own) : std::vector<Channel>();
                add_map(maps, lists, views[g], pixels, own, x, second >= 0 ? &other : nullptr);
            }
            MapLayer layer = layer_of(maps, lists, pixels);
            layer.affine = affine(step);
            if (pass + 1 == passes) layer.activation = step.activation, layer.param = step.param;
            const Buffer device(memory_, lists.bytes());
            layer.lists = device.data;
            const DType dtype = program_.dtype;
            switch (node.kind) {
                case Operation::conv:
                    depthwise(dtype, layer, window(node), node.weight, maps.blocks, stream_);
                    break;
                case Operation::multiply: {
                    const Value &out = value(node.output), &gate = value(node.inputs[1]);
                    product(dtype, layer, out.height * out.width, gate.height * gate.width, maps.blocks,
                            stream_);
                    break;
                }
                case Operation::max_pool:
                case Operation::avg_pool:
                    pool(dtype, layer, window(node), node.kind == Operation::max_pool, node.count_padding,
                         maps.blocks, stream_);
                    break;
                default:
                    pointwise(dtype, layer, maps.blocks, stream_);
            }
        }
    }

    // Mean, then variance, of every channel that reaches a norm; into the rows of all that keep it.
    void measure(const Step& step, const std::vector<Range>& ranges,
                 const std::vector<std::vector<Column>>& columns) {
        const Node& node = step.node;
        const auto& genes = value(node.output).genes;
        Lists lists;
        std::vector<MomentTask> tasks;
        std::vector<MomentEntry> entries;
        const std::int64_t pixels = rows(node.output), pieces = ceil_div(pixels, kPiece);
        std::int64_t total = 0;
        for (const auto& c : columns) total += std::int64_t(c.size()) * pieces;
        const Buffer partial(memory_, total * std::int64_t(sizeof(double)));
        auto* next = reinterpret_cast<double*>(partial.data);
        std::int64_t blocks = 0;
        for (std::size_t g = 0; g < ranges.size(); ++g) {
            const auto& own = columns[g];
            if (own.empty()) continue;
            for (std::size_t j = 0; j < own.size(); ++j)
                for (std::int64_t k = ranges[g].begin; k < ranges[g].end; ++k)
                    if (kept(k, genes[std::size_t(own[j].channel)]))
                        entries.push_back({std::int32_t(tasks.size()), std::int32_t(j),
                                           std::int32_t(sorted_.individual[std::size_t(k)]), own[j].channel});
            tasks.push_back({blocks, lists.add(read(node.inputs[0], view(node.inputs[0], ranges[g]), own)),
                             lists.add(numbered(own)), next, int(own.size())});
            next += std::int64_t(own.size()) * pieces;
            blocks += pieces;
        }
        MomentLayer layer{};
        layer.tasks = lists.add(tasks), layer.entries = lists.add(entries);
        layer.count = int(tasks.size()), layer.num_entries = std::int64_t(entries.size()),
        layer.rows = pixels;
        layer.mean = static_cast<double*>(run_.moments[step.norm].mean);
        layer.variance = static_cast<double*>(run_.moments[step.norm].variance);
        layer.channels = value(node.output).channels;
        const Buffer device(memory_, lists.bytes());
        layer.lists = device.data;
        for (layer.power = 1; layer.power <= 2; ++layer.power)
            moments(layer, program_.dtype, blocks, stream_);
    }

    // --- lists of channels ----------------------------------------------------------------------------

    // The view of a value made of others without work; its channels come one by one from source(view, c).
    template <class Source> void spread(const Node& node, const std::vector<Range>& ranges, Source source) {
        for (const Range& g : ranges) {
            View w{g.begin, g.end, {}, {}, {}, nullptr};
            w.channels.assign(std::size_t(value(node.output).channels), {nullptr, 0});
            for (int v : node.inputs)
                for (const Owner& owner : view(v, g).owners) w.owners.push_back(owner);
            for (const Column& c : wanted(node.output, g))
                w.channels[std::size_t(c.channel)] = source(g, c.channel);
            live_[std::size_t(node.output)].push_back(std::move(w));
        }
    }
    void select(const Node& node, const std::vector<Range>& ranges) {
        spread(node, ranges, [&](Range g, std::int64_t c) {
            const std::int32_t input = node.select[std::size_t(2 * c)];
            if (input < 0) return Channel{nullptr, 0};
            return view(node.inputs[std::size_t(input)], g)
                .channels[std::size_t(node.select[std::size_t(2 * c + 1)])];
        });
    }
    void flatten(const Node& node, const std::vector<Range>& ranges) {
        const Value& in = value(node.inputs[0]);
        const std::int64_t pixels = in.height * in.width;
        spread(node, ranges, [&](Range g, std::int64_t c) {
            const Channel& from = view(node.inputs[0], g).channels[std::size_t(c / pixels)];
            if (!from.data) return Channel{nullptr, 0};
            return Channel{static_cast<const char*>(from.data) + c % pixels * from.pitch * size_,
                           from.pitch * pixels};
        });
    }

    // --- convolutions ---------------------------------------------------------------------------------

    // What `columns` of v are to these individuals, side by side: as it lies, or as a copy.
    const View& side_by_side(int v, Range g, const std::vector<Column>& columns, Maps& copies, Lists& lists) {
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
        add_map(copies, lists, copy, rows(v), columns, read(v, from, columns), nullptr);
        live_[std::size_t(v)].push_back(std::move(copy));
        return live_[std::size_t(v)].back();
    }

    void conv(const Step& step, const std::vector<Range>& ranges,
              const std::vector<std::vector<Column>>& columns, const std::vector<View>& views) {
        const Node& node = step.node;
        const int input = node.inputs[0];
        const Value &in = value(input), &out = value(node.output);
        const std::int64_t taps = node.kernel[0] * node.kernel[1], pixels = rows(node.output);
        const std::int64_t group_in = in.channels / node.groups, group_out = out.channels / node.groups;
        const std::int64_t chunk = kChunkBytes / size_;
        Lists lists;
        Maps copies;
        std::vector<ConvTask> tasks;
        std::vector<PackTask> packs;
        std::int64_t packed_bytes = 0, width = 0, pack_blocks = 0;
        for (std::size_t g = 0; g < ranges.size(); ++g) {
            const auto &outputs = columns[g], inputs = wanted(input, ranges[g]);
            if (outputs.empty()) continue;
            const View x = side_by_side(input, ranges[g], inputs, copies, lists);  // a copy: the list grows
            for (std::size_t j = 0; j < outputs.size();) {
                const std::int64_t q = outputs[j].channel / group_out;
                std::size_t last = j;
                while (last < outputs.size() && outputs[last].channel / group_out == q) ++last;
                // Positions of this group of channels, and what is at each.
                std::size_t from = 0, to = x.at.size();
                if (node.groups > 1) {
                    to = inputs.size();
                    while (from < to && inputs[from].channel < q * group_in) ++from;
                    while (to > from && inputs[to - 1].channel >= (q + 1) * group_in) --to;
                }
                std::vector<std::int32_t> channels;
                for (std::size_t p = from; p < to; ++p)
                    channels.push_back(x.at[p] < 0 ? -1 : std::int32_t(x.at[p] - q * group_in));
                channels.resize(std::size_t(round_up(std::int64_t(channels.size()), pad_)), -1);
                const std::vector<Column> own(outputs.begin() + std::ptrdiff_t(j),
                                              outputs.begin() + std::ptrdiff_t(last));

                ConvTask t{};
                t.in = static_cast<const char*>(x.data) + std::int64_t(from) * size_;
                t.in_pitch = std::int64_t(x.at.size());
                t.inputs = int(to - from), t.positions = int(channels.size());
                t.depth = round_up(taps * t.positions, chunk);
                t.columns = lists.add(numbered(own));
                t.residual = kNone;
                if (step.residual >= 0)
                    t.residual = lists.add(read(step.residual, view(step.residual, ranges[g]), own));
                t.out = static_cast<char*>(const_cast<void*>(views[g].data)) + std::int64_t(j) * size_;
                t.out_pitch = int(views[g].at.size());
                t.outputs = int(last - j);
                t.width = last == outputs.size() ? t.out_pitch - int(j) : t.outputs;

                PackTask p{};
                p.first = pack_blocks;
                p.channels = lists.add(channels), p.columns = t.columns;
                p.outputs = t.outputs, p.positions = t.positions, p.depth = t.depth;
                p.packed = reinterpret_cast<void*>(packed_bytes);  // a distance, until there is memory
                packed_bytes += round_up(p.outputs * p.depth * size_, kAlign);
                pack_blocks += ceil_div(p.outputs * p.depth, kPackElements);
                width += t.width;
                tasks.push_back(t), packs.push_back(p);
                j = last;
            }
        }
        if (tasks.empty()) return;
        const Buffer packed(memory_, packed_bytes);
        const int tile = conv_tile(program_.dtype, tf32_, double(width) / double(tasks.size()));
        std::int64_t tiles = 0;
        for (std::size_t k = 0; k < tasks.size(); ++k) {
            packs[k].packed = packed.data + reinterpret_cast<std::intptr_t>(packs[k].packed);
            tasks[k].packed = packs[k].packed;
            tasks[k].first = tiles;
            tiles += conv_tiles(tasks[k], pixels, tile);
        }
        MapLayer copy = layer_of(copies, lists, rows(input));
        PackLayer pack_layer{};
        pack_layer.tasks = lists.add(packs), pack_layer.count = int(packs.size());
        pack_layer.weight = node.weight, pack_layer.row = group_in * taps, pack_layer.taps = int(taps);
        ConvLayer layer{};
        layer.tasks = lists.add(tasks), layer.count = int(tasks.size());
        layer.window = window(node), layer.aligned = node.groups == 1;
        layer.affine = affine(step), layer.activation = step.activation, layer.param = step.param;
        const Buffer device(memory_, lists.bytes());
        copy.lists = pack_layer.lists = layer.lists = device.data;
        pointwise(program_.dtype, copy, copies.blocks, stream_);
        pack(program_.dtype, pack_layer, pack_blocks, stream_);
        cuda::conv(program_.dtype, layer, tile, tf32_, tiles, stream_);
    }

    // --- in and out -----------------------------------------------------------------------------------

    TransferLayer transfer(const Value& shape) const {
        TransferLayer layer{};
        layer.images = run_.images, layer.pixels = shape.height * shape.width,
        layer.channels = shape.channels;
        return layer;
    }

    void load() {
        const auto ranges = parts();
        std::vector<std::vector<Column>> columns;
        for (const Range& g : ranges) columns.push_back(wanted(0, g));
        auto views = allocate(0, ranges, columns);
        TransferLayer layer = transfer(value(0));
        Lists lists;
        std::vector<TransferTask> tasks;
        std::int64_t blocks = 0;
        for (std::size_t g = 0; g < ranges.size(); ++g) {
            if (columns[g].empty()) continue;
            const char* x = static_cast<const char*>(run_.x);
            x += sorted_.individual[std::size_t(ranges[g].begin)] * run_.x_stride * size_of(run_.x_dtype);
            TransferTask t{};
            t.first = blocks, t.outer = const_cast<char*>(x), t.columns = lists.add(columns[g]);
            t.out = const_cast<void*>(views[g].data);
            t.width = int(columns[g].size()), t.pitch = int(views[g].at.size());
            blocks += ceil_div(rows(0), map_rows(t.pitch));
            tasks.push_back(t);
        }
        layer.tasks = lists.add(tasks), layer.count = int(tasks.size());
        const Buffer device(memory_, lists.bytes());
        layer.lists = device.data;
        cuda::load(program_.dtype, run_.x_dtype, layer, blocks, stream_);
        live_[0] = std::move(views);
    }

    void store() {
        const int v = program_.output;
        const Value& shape = value(v);
        TransferLayer layer = transfer(shape);
        Lists lists;
        std::vector<TransferTask> tasks;
        std::int64_t blocks = 0;
        for (std::int64_t k = 0; k < run_.individuals; ++k) {
            const View& w = view(v, {k, k + 1});
            std::vector<Channel> channels;
            for (std::int64_t c = 0; c < shape.channels; ++c) channels.push_back(seen_by(k, v, c, w));
            TransferTask t{};
            t.first = blocks;
            t.outer = static_cast<char*>(run_.out) +
                      sorted_.individual[std::size_t(k)] * rows(v) * shape.channels * size_of(run_.out_dtype);
            t.x = lists.add(channels);
            t.width = t.pitch = int(shape.channels);
            blocks += ceil_div(rows(v), map_rows(t.pitch));
            tasks.push_back(t);
        }
        layer.tasks = lists.add(tasks), layer.count = int(tasks.size());
        const Buffer device(memory_, lists.bytes());
        layer.lists = device.data;
        cuda::store(program_.dtype, run_.out_dtype, layer, blocks, stream_);
    }

    const Program& program_;
    const Schedule& s_;
    const NetworkRun& run_;
    const bool tf32_;
    Memory& memory_;
    void* stream_;
    const std::int64_t size_, pad_;
    const Sorted sorted_;
    std::vector<std::vector<View>> live_;
    std::vector<char> cut_;  // between an individual and the one before
};

}  // namespace

Network::Network(DType dtype, std::int64_t genes, std::vector<Value> values, std::vector<Node> nodes,
                 int output)
    : program_(new Program(dtype, genes, std::move(values), std::move(nodes), output)) {}
Network::~Network() = default;

std::int64_t Network::norms() const { return program_->norms; }

Outline Network::outline() const { return program_->outline(); }

void Network::run(const NetworkRun& run, bool tf32, Memory& memory, void* stream) const {
    if (run.individuals && run.images) Execution(*program_, run, tf32, memory, stream)();
}

// As if nothing were shared and nothing masked, and every input of a convolution copied.
std::int64_t Network::bytes(std::int64_t images, bool recalibrate, std::int64_t individuals) const {
    const Schedule& s = recalibrate ? program_->recalibrate : program_->inherit;
    const std::int64_t size = size_of(program_->dtype), pad = kPadBytes / size;
    auto planes = [&](int v) {
        const Value& shape = program_->values[std::size_t(v)];
        return round_up(images * shape.height * shape.width * round_up(shape.channels, pad) * size, kAlign);
    };
    std::vector<std::int64_t> held(program_->values.size(), 0);
    held[0] = planes(0);
    std::int64_t live = held[0], most = live;
    for (const Step& step : s.steps) {
        const Node& n = step.node;
        const Value& out = program_->values[std::size_t(n.output)];
        const bool spread = n.kind == Operation::select || n.kind == Operation::flatten;
        std::int64_t now = 256 * (out.channels + 4);  // lists
        if (n.kind == Operation::conv) {
            const int v = n.inputs[0];
            const Value& in = program_->values[std::size_t(v)];
            const std::int64_t taps = n.kernel[0] * n.kernel[1];
            held[std::size_t(v)] += planes(v), live += planes(v);
            now += 256 * in.channels +
                   size * out.channels *
                       (round_up(taps * round_up(in.channels / n.groups, pad), kChunkBytes) + kAlign);
        }
        if (recalibrate && n.kind == Operation::norm)
            now += 8 * out.channels * ceil_div(images * out.height * out.width, kPiece);
        // What a view without memory of its own shows lives as long as it does.
        held[std::size_t(n.output)] = spread ? 0 : planes(n.output);
        live += held[std::size_t(n.output)];
        most = std::max(most, live + now);
        for (int v : step.dying) {
            bool shown = false;
            for (const Step& other : s.steps)
                if (other.node.kind == Operation::select || other.node.kind == Operation::flatten)
                    for (int i : other.node.inputs) shown = shown || i == v;
            if (!shown) live -= held[std::size_t(v)];
        }
    }
    return most * individuals;
}

}  // namespace fastkd::cuda
