// One thread's walk through a network: some blocks of images, for some of the individuals.
#pragma once

#include "network/cpu/memory.h"
#include "network/schedule.h"

namespace fastkd::cpu {

// A value while it is alive: a plane per block and channel, null where not computed.
struct Live {
    std::vector<void*> planes;  // [blocks, channels]
    std::vector<std::shared_ptr<char>> owners;
    void clear() { planes.clear(), owners.clear(); }
};

class Walk {
  public:
    Walk(const Sorted&, const Schedule&, const NetworkRun&, const ImageBlocks&, BufferPool&,
         std::int64_t first_block, std::int64_t num_blocks);

    // For the individuals [begin, end).
    void operator()(std::int64_t begin, std::int64_t end);

  private:
    // What a step does now: which channels, for which individuals [begin, end).
    struct Task {
        const Step& step;
        std::vector<Column> columns;
        std::int64_t begin, end;
    };

    // walk.cpp
    void descend(std::size_t k, std::int64_t begin, std::int64_t end, int pending);
    std::int64_t sharing(const Step&, std::int64_t begin, std::int64_t end) const;
    bool same_affine(const Step&, std::int64_t a, std::int64_t b, std::int64_t channel) const;
    void allocate(int v, const std::vector<Column>&);
    void load(std::int64_t individual);
    void store(std::int64_t begin, std::int64_t end);
    void select(const Task&);
    void flatten(const Node&);
    PlaneTransfer transfer(void* outer, DType, int v, std::int64_t block, std::int64_t channel) const;

    // layers.cpp
    void execute(const Step&, std::int64_t begin, std::int64_t end);
    void conv(const Task&);
    void prepare(const Task&);
    std::size_t prepare_group(const Task&, std::size_t first, std::size_t& bytes);
    void pointwise(const Task&);
    struct Line {
        double scale, shift;
    };
    Line line(const Task&, const Column&) const;
    Line measured_line(const Task&, const Column&) const;
    double moment(int v, std::int64_t channel, double mean, int power) const;
    void add(const Task&);
    void multiply(const Task&);
    void pool(const Task&);
    void zero(int v, std::int64_t block, std::int64_t channel) const;

    const Value& value(int v) const { return program_.value(v); }
    std::int64_t images(std::int64_t b) const { return blocks_.padded(first_ + b); }
    void* plane(int v, std::int64_t b, std::int64_t c) const {
        return live_[std::size_t(v)].planes[std::size_t(b * value(v).channels + c)];
    }
    // Channel c of v as individual k sees it.
    void* seen_by(std::int64_t k, int v, std::int64_t b, std::int64_t c) const {
        return sorted_.kept(k, value(v).genes[std::size_t(c)]) ? plane(v, b, c) : nullptr;
    }
    // Row of the scale (shift) of a norm that individual k uses.
    const char* affine(const Step& step, std::int64_t k, bool shift) const {
        const Affine a = affine_of(run_, step);
        return static_cast<const char*>(shift ? a.shift : a.scale) +
               sorted_.individual[std::size_t(k)] * a.stride * size_;
    }
    double number(const void* row, std::int64_t c) const {
        if (program_.dtype == DType::f64) return static_cast<const double*>(row)[c];
        return static_cast<const float*>(row)[c];
    }

    // A convolution for some individuals: what does not depend on the images.
    struct Layer {
        struct Group {
            std::size_t first, last;              // of the columns
            std::size_t first_input, last_input;  // of the inputs
            std::size_t packed;                   // bytes
        };
        std::vector<std::int32_t> inputs, outputs;
        std::vector<Group> groups;
        std::vector<char> scale, shift, packed;
    };

    const Sorted& sorted_;
    const Program& program_;
    const Schedule& s_;
    const NetworkRun& run_;
    const ImageBlocks& blocks_;
    BufferPool& pool_;
    const std::int64_t first_, count_;  // blocks
    const std::int64_t size_;           // of a number
    std::vector<Live> live_;
    Layer layer_;
    std::vector<std::int32_t> within_;               // inputs of a group, from its first
    std::vector<const void*> in_planes_, residual_;  // of the convolution that is computed
    std::vector<void*> out_planes_;
};

}  // namespace fastkd::cpu
