// One run of a population through a network on the GPU: what the host plans, and what it launches.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>

#include "network/cuda/maps.cuh"
#include "network/schedule.h"

namespace fastkd::cuda {

constexpr std::int64_t kAlign = 256;

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

using Groups = std::vector<Range>;                 // of neighbours that share a step
using Columns = std::vector<std::vector<Column>>;  // of a result, for each group

class Execution {
  public:
    Execution(const Program&, const NetworkRun&, bool tf32, Memory&, void* stream);
    void operator()();

  private:
    // Tasks of one launch, and the blocks that they take.
    template <class Task> struct Batch {
        std::vector<Task> tasks;
        std::int64_t blocks = 0;
        void add(Task task, std::int64_t more) {
            task.first = blocks;
            blocks += more;
            tasks.push_back(task);
        }
        template <class Layer> void list(Layer& layer, Lists& lists) const {
            layer.tasks = lists.add(tasks), layer.count = int(tasks.size());
        }
    };
    using Maps = Batch<MapTask>;

    // execution.cu
    void load();
    void store();
    void execute(const Step&);
    void select(const Node&, const Groups&);
    void flatten(const Node&, const Groups&);
    template <class Source> void spread(const Node&, const Groups&, Source);
    Groups groups(const Step&);
    Groups parts() const;
    std::vector<View> allocate(int v, const Groups&, const Columns&) const;
    TransferLayer transfer(int v) const;

    // plan_maps.cu
    void maps(const Step&, const Groups&, const Columns&, const std::vector<View>&);
    void launch_maps(const Node&, const MapLayer&, std::int64_t blocks) const;
    void measure(const Step&, const Groups&, const Columns&);
    void add_map(Maps&, Lists&, const View& out, std::int64_t pixels, const std::vector<Column>&,
                 const std::vector<Channel>& x, const std::vector<Channel>* other) const;
    AffineOf affine(const Step&) const;
    ImageWindow window(const Node&) const;

    // plan_conv.cu
    struct Convolution;
    struct Inputs;
    void conv(const Step&, const Groups&, const Columns&, const std::vector<View>&);
    void plan_products(const Step&, Range, const std::vector<Column>& outputs, const View& out, Convolution&);
    void launch_conv(const Step&, Convolution&, const Batch<ConvTask>& products, int tile);
    View side_by_side(int v, Range, const std::vector<Column>&, Convolution&);
    Inputs inputs_of(const View& x, const std::vector<Column>& inputs, const Node&, std::int64_t group) const;

    const Value& value(int v) const { return program_.value(v); }
    std::int64_t rows(int v) const { return run_.images * value(v).height * value(v).width; }
    std::int64_t pitch_of(std::size_t channels) const { return round_up(std::int64_t(channels), pad_); }

    const View& view(int v, Range g) const {
        for (const View& w : live_[std::size_t(v)])
            if (w.begin <= g.begin && g.end <= w.end) return w;
        throw std::logic_error("network: a value is read after its end");
    }
    // Channel c of v as an individual sees it.
    Channel seen_by(std::int64_t k, int v, std::int64_t c, const View& w) const {
        return sorted_.kept(k, value(v).genes[std::size_t(c)]) ? w.channels[std::size_t(c)]
                                                               : Channel{nullptr, 0};
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

    const Program& program_;
    const Schedule& s_;
    const NetworkRun& run_;
    const bool tf32_;
    Memory& memory_;
    void* stream_;
    const std::int64_t size_, pad_;  // bytes of a number; numbers to which channels are padded
    const Sorted sorted_;
    std::vector<std::vector<View>> live_;
    std::vector<char> cut_;  // between an individual and the one before
};

}  // namespace fastkd::cuda
