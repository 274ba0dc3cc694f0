// Which nodes are done at once: a norm, a residual and an activation are computed in the epilogue of what
// they follow, where nobody else reads the value between them.
#include "network/schedule.h"

namespace fastkd {
namespace {

class Fusion {
  public:
    Fusion(const Program& program, bool keep_batch)
        : program_(program), keep_batch_(keep_batch), uses_(program.values.size(), 0) {
        s_.producer.assign(program.values.size(), -1);
        for (const Node& n : program.nodes)
            for (int v : n.inputs) ++uses_[std::size_t(v)];
        ++uses_[std::size_t(program.output)];
    }

    Schedule operator()() {
        for (std::size_t k = 0; k < program_.nodes.size(); ++k) {
            const Node& node = program_.nodes[k];
            Step* step = fused(k);
            if (!step) {
                s_.steps.push_back(alone(k));
                step = &s_.steps.back();
            }
            step->node.output = node.output;
            s_.producer[std::size_t(node.output)] = int(step - s_.steps.data());
        }
        for (std::size_t k = 0; k < s_.steps.size(); ++k)
            if (s_.steps[k].node.kind == Operation::norm && s_.steps[k].node.batch) s_.measured = k + 1;
        return std::move(s_);
    }

  private:
    int producer(int v) const { return s_.producer[std::size_t(v)]; }

    // The step that makes v, if its epilogue has room for this stage and v is read by node n alone.
    Step* room(int v, const Node& n, Stage stage) {
        if (producer(v) < 0 || uses_[std::size_t(v)] != 1) return nullptr;
        Step& step = s_.steps[std::size_t(producer(v))];
        const bool epilogue = step.node.kind == Operation::conv ||
                              (step.node.kind == Operation::norm && stage > Stage::norm) ||
                              (step.node.kind == Operation::add && stage > Stage::residual);
        const bool same = program_.value(v).genes == program_.value(n.output).genes;
        return epilogue && step.stage < stage && same ? &step : nullptr;
    }

    // The step of which node k becomes a part, or null.
    Step* fused(std::size_t k) {
        const Node& n = program_.nodes[k];
        switch (n.kind) {
            case Operation::norm:
                return keep_batch_ && n.batch ? nullptr : with_norm(room(n.inputs[0], n, Stage::norm), k);
            case Operation::activation:
                return with_activation(room(n.inputs[0], n, Stage::activation), n);
            case Operation::add:
                return n.inputs.size() == 2 ? with_residual(n) : nullptr;
            default:
                return nullptr;
        }
    }

    Step* with_norm(Step* step, std::size_t k) const {
        if (step)
            step->norm = program_.norm_of[k], step->affine = &program_.nodes[k], step->stage = Stage::norm;
        return step;
    }
    static Step* with_activation(Step* step, const Node& n) {
        if (step) step->activation = n.activation, step->param = n.param, step->stage = Stage::activation;
        return step;
    }
    // A sum of two is computed by what makes one of them, if the other is there before.
    Step* with_residual(const Node& n) {
        for (int k = 0; k < 2; ++k) {
            const int v = n.inputs[std::size_t(k)], other = n.inputs[std::size_t(1 - k)];
            Step* step = room(v, n, Stage::residual);
            if (!step || producer(other) >= producer(v)) continue;
            step->residual = other, step->stage = Stage::residual;
            return step;
        }
        return nullptr;
    }

    // Node k as a step of its own.
    Step alone(std::size_t k) const {
        Step step;
        step.node = program_.nodes[k];
        if (step.node.kind == Operation::norm) with_norm(&step, k);
        if (step.node.kind == Operation::add) step.stage = Stage::residual;
        if (step.node.kind == Operation::activation) with_activation(&step, step.node);
        return step;
    }

    const Program& program_;
    const bool keep_batch_;
    std::vector<int> uses_;  // of each value, by nodes or as the result
    Schedule s_;
};

}  // namespace

Schedule fuse(const Program& program, bool keep_batch) { return Fusion(program, keep_batch)(); }

}  // namespace fastkd
