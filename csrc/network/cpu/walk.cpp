// How a walk goes from step to step, and what needs no arithmetic: planes, lists of them, input and result.
#include "network/cpu/walk.h"

#include <cstring>

namespace fastkd::cpu {

Walk::Walk(const Sorted& sorted, const Schedule& s, const NetworkRun& run, const ImageBlocks& blocks,
           BufferPool& pool, std::int64_t first_block, std::int64_t num_blocks)
    : sorted_(sorted),
      program_(sorted.program),
      s_(s),
      run_(run),
      blocks_(blocks),
      pool_(pool),
      first_(first_block),
      count_(num_blocks),
      size_(size_of(program_.dtype)),
      live_(program_.values.size()) {}

void Walk::operator()(std::int64_t begin, std::int64_t end) {
    if (!run_.x_stride) {
        load(0);
        return descend(0, begin, end, -1);
    }
    for (std::int64_t k = begin; k < end; ++k) {
        load(sorted_.individual[std::size_t(k)]);
        descend(0, k, k + 1, -1);
    }
}

// Steps from k on. Where the individuals part, values made before step `pending` are kept for those that
// follow.
void Walk::descend(std::size_t k, std::int64_t begin, std::int64_t end, int pending) {
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

// The end of the individuals from `begin` on that share this step.
std::int64_t Walk::sharing(const Step& step, std::int64_t begin, std::int64_t end) const {
    std::int64_t k = begin + 1;
    while (k < end && sorted_.agree[std::size_t(k)] >= step.seen) ++k;
    if (step.norm < 0 || !run_.affines || !run_.affines[step.norm].stride) return k;
    // Individuals with parameters of their own share it if they agree on every channel that both keep.
    const auto& genes = value(step.node.output).genes;
    std::vector<std::int64_t> owner(genes.size(), -1);
    for (std::int64_t i = begin; i < k; ++i)
        for (std::size_t c = 0; c < genes.size(); ++c) {
            if (!sorted_.kept(i, genes[c])) continue;
            if (owner[c] < 0) owner[c] = i;
            else if (!same_affine(step, i, owner[c], std::int64_t(c))) return i;
        }
    return k;
}

bool Walk::same_affine(const Step& step, std::int64_t a, std::int64_t b, std::int64_t channel) const {
    for (bool shift : {false, true})
        if (std::memcmp(affine(step, a, shift) + channel * size_, affine(step, b, shift) + channel * size_,
                        std::size_t(size_)))
            return false;
    return true;
}

// Planes for these channels of v; all others are null.
void Walk::allocate(int v, const std::vector<Column>& columns) {
    const Value& shape = value(v);
    Live& live = live_[std::size_t(v)];
    live.planes.assign(std::size_t(count_ * shape.channels), nullptr);
    live.owners.clear();
    std::int64_t bytes = 0;
    for (std::int64_t b = 0; b < count_; ++b) bytes += planes_bytes(shape, images(b), size_);
    live.owners.push_back(pool_.take(bytes));
    char* next = live.owners[0].get();
    for (std::int64_t b = 0; b < count_; ++b)
        for (const Column& c : columns) {
            live.planes[std::size_t(b * shape.channels + c.channel)] = next;
            next += plane_step(shape.height * shape.width, images(b), size_);
        }
}

PlaneTransfer Walk::transfer(void* outer, DType dtype, int v, std::int64_t b, std::int64_t c) const {
    const Value& shape = value(v);
    const std::int64_t pixels = shape.height * shape.width, image = pixels * shape.channels;
    char* at = static_cast<char*>(outer) + (blocks_.first(first_ + b) * image + c * pixels) * size_of(dtype);
    return {at, dtype, image, pixels, images(b), blocks_.valid(first_ + b), plane(v, b, c)};
}

void Walk::load(std::int64_t individual) {
    std::vector<Column> all;
    for (std::int64_t c = 0; c < value(0).channels; ++c) all.push_back({std::int32_t(c), 0});
    allocate(0, all);
    char* x = const_cast<char*>(static_cast<const char*>(run_.x)) +
              individual * run_.x_stride * size_of(run_.x_dtype);
    for (std::int64_t b = 0; b < count_; ++b)
        for (const Column& c : all) plane_load(program_.dtype, transfer(x, run_.x_dtype, 0, b, c.channel));
}

void Walk::store(std::int64_t begin, std::int64_t end) {
    if (!run_.out) return;
    const Value& shape = value(program_.output);
    const std::int64_t pixels = shape.height * shape.width, size = size_of(run_.out_dtype);
    const std::int64_t row = blocks_.images * shape.channels * pixels * size;
    auto store_channel = [&](std::int64_t k, std::int64_t b, std::int64_t c) {
        char* out = static_cast<char*>(run_.out) + sorted_.individual[std::size_t(k)] * row;
        const PlaneTransfer t = transfer(out, run_.out_dtype, program_.output, b, c);
        if (t.plane && sorted_.kept(k, shape.genes[std::size_t(c)])) return plane_store(program_.dtype, t);
        for (std::int64_t n = 0; n < t.valid; ++n)
            std::memset(static_cast<char*>(t.outer) + n * t.image_step * size, 0, std::size_t(pixels * size));
    };
    for (std::int64_t k = begin; k < end; ++k)
        for (std::int64_t b = 0; b < count_; ++b)
            for (std::int64_t c = 0; c < shape.channels; ++c) store_channel(k, b, c);
}

void Walk::select(const Task& task) {
    const Node& node = task.step.node;
    const Value& shape = value(node.output);
    Live& live = live_[std::size_t(node.output)];
    live.planes.assign(std::size_t(count_ * shape.channels), nullptr);
    live.owners.clear();
    for (int v : node.inputs)
        live.owners.insert(live.owners.end(), live_[std::size_t(v)].owners.begin(),
                           live_[std::size_t(v)].owners.end());
    for (const Column& c : task.columns) {
        const std::int32_t input = node.select[std::size_t(2 * c.channel)];
        if (input < 0) continue;
        for (std::int64_t b = 0; b < count_; ++b)
            live.planes[std::size_t(b * shape.channels + c.channel)] =
                plane(node.inputs[std::size_t(input)], b, node.select[std::size_t(2 * c.channel + 1)]);
    }
}

void Walk::flatten(const Node& node) {
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
                        plane + p * images(b) * size_;
}

}  // namespace fastkd::cpu
