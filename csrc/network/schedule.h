// What both back ends make of a network before they run it: nodes that are done at once become steps, and
// individuals are put in an order in which neighbours share the results of as many steps as possible.
#pragma once

#include "common/window.h"
#include "network/network.h"

namespace fastkd {

// What a step has done last: things are fused in this order.
enum class Stage : int { main, norm, residual, activation };

// A node with what is computed in its epilogue: norm, then residual, then activation.
struct Step {
    Node node;
    int norm = -1;                 // index of the norm, of the node or fused
    const Node* affine = nullptr;  // the norm itself
    int residual = -1;             // a value
    Activation activation = Activation::none;
    double param = 0;
    Stage stage = Stage::main;
    std::int64_t seen = 0;   // genes (in order) that the result's planes depend on
    std::vector<int> dying;  // values that no later step reads

    std::vector<int> reads() const;  // the node's inputs, then the residual
    // Is the result a list of channels of other values, without numbers of its own?
    bool is_list() const { return node.kind == Operation::select || node.kind == Operation::flatten; }
};

struct Schedule {
    std::vector<Step> steps;
    std::vector<int> producer;        // of each value: a step, or -1
    std::vector<std::int32_t> order;  // genes in the order in which they are met
    std::size_t measured = 0;         // steps up to the last that measures a batch
};

struct Program {
    Program(DType dtype, std::int64_t genes, std::vector<Value> values, std::vector<Node> nodes, int output);
    Outline outline() const;
    const Value& value(int v) const { return values[std::size_t(v)]; }
    const Schedule& schedule(const NetworkRun& run) const { return run.moments ? recalibrate : inherit; }
    // Does channel c of what a node makes read no other channel than c?
    bool by_channel(const Node&) const;

    DType dtype;
    std::int64_t genes;
    std::vector<Value> values;
    std::vector<Node> nodes;
    int output;
    std::vector<int> norm_of;  // node -> index of its norm, or -1
    std::int64_t norms = 0;
    std::int64_t work = 0;          // products for one image of the whole network
    Schedule inherit, recalibrate;  // recalibrate: norms of a batch stay steps of their own
};

// The passes that make a schedule. With keep_batch, norms of a batch are not fused.
Schedule fuse(const Program&, bool keep_batch);  // steps, producer, measured
void order_genes(const Program&, Schedule&);     // order, and seen of the steps
void end_values(const Program&, Schedule&);      // dying of the steps

// When a value has a buffer of its own: from the step that makes it (-1 for the input) to the last that
// needs it, the number of steps for the result. Values that are lists have none, and what they list lives
// as long as they do.
struct Lifetime {
    int made, dies;
    bool across(int step) const { return made < step && step <= dies; }
};
std::vector<Lifetime> lifetimes(const Program&, const Schedule&);

// One channel of a result, and the first of some individuals that keeps it.
struct Column {
    std::int32_t channel, keeper;
};

// Individuals such that neighbours agree on their first genes, on as many as possible. From here on an
// individual is a place in this order.
struct Sorted {
    Sorted(const Program&, const Schedule&, const std::uint8_t* masks, std::int64_t individuals);
    // Does individual k have a channel with this gene?
    bool kept(std::int64_t k, std::int32_t gene) const {
        return gene == kAlways || (gene >= 0 && masks[individual[std::size_t(k)] * program.genes + gene]);
    }
    // The channels of v that some of the individuals [begin, end) keep.
    std::vector<Column> wanted(int v, std::int64_t begin, std::int64_t end) const;

    const Program& program;
    const std::uint8_t* masks;
    std::vector<std::int64_t> individual;  // the number, in the run, of each place
    std::vector<std::int64_t> agree;  // genes, of those in order, on which each agrees with the one before
};

// Scale and shift of a step's norm: those of the run, or else the norm's own.
Affine affine_of(const NetworkRun&, const Step&);

// The window of a convolution or of a pool.
template <class I> Window<I> window_of(const Program& program, const Node& node) {
    const Value &in = program.value(node.inputs[0]), &out = program.value(node.output);
    Window<I> w{{I(in.height), I(in.width)}, {I(out.height), I(out.width)}, {}, {}, {}, {}};
    for (int axis = 0; axis < 2; ++axis) {
        w.kernel[axis] = I(node.kernel[axis]), w.stride[axis] = I(node.stride[axis]);
        w.padding[axis] = I(node.padding[axis]), w.dilation[axis] = I(node.dilation[axis]);
    }
    return w;
}

}  // namespace fastkd
