// What both back ends make of a network before they run it: nodes that are done at once become steps, and
// individuals are put in an order in which neighbours share the results of as many steps as possible.
#pragma once

#include <string>

#include "network/network.h"

namespace fastkd {

// A node with what is computed in its epilogue: norm, then residual, then activation.
struct Step {
    Node node;
    int norm = -1;                 // index of the norm, of the node or fused
    const Node* affine = nullptr;  // the norm itself
    int residual = -1;             // a value
    Activation activation = Activation::none;
    double param = 0;
    int stage = 0;           // of the last thing fused
    std::int64_t seen = 0;   // genes (in order) that the result's planes depend on
    std::vector<int> dying;  // values that no later step reads
};

struct Schedule {
    std::vector<Step> steps;
    std::vector<int> producer;        // of each value: a step, or -1
    std::vector<std::int32_t> order;  // genes in the order in which they are met
    std::size_t measured = 0;         // steps up to the last that measures a batch
};

// Does channel c of the result read no other channel than c?
bool by_channel(const Node&, const Value& in, const Value& out);

struct Program {
    Program(DType dtype, std::int64_t genes, std::vector<Value> values, std::vector<Node> nodes, int output);
    Outline outline() const;
    // Does an individual have a channel with this gene?
    bool kept(const std::uint8_t* mask, std::int32_t gene) const {
        return gene == kAlways || (gene >= 0 && mask[gene]);
    }

    DType dtype;
    std::int64_t genes;
    std::vector<Value> values;
    std::vector<Node> nodes;
    int output;
    std::vector<int> norm_of;  // node -> index of its norm, or -1
    std::int64_t norms = 0;
    std::int64_t work = 0;          // products for one image of the whole network
    Schedule inherit, recalibrate;  // recalibrate: norms of a batch stay steps of their own

  private:
    Schedule schedule(bool keep_batch) const;
};

// Individuals such that neighbours agree on their first genes, on as many as possible.
struct Sorted {
    Sorted(const Program&, const Schedule&, const std::uint8_t* masks, std::int64_t individuals);
    std::vector<std::int64_t> individual;
    std::vector<std::int64_t> agree;  // genes, of those in order, on which each agrees with the one before
};

}  // namespace fastkd
