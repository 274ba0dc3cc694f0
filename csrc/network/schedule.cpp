#include "network/schedule.h"

#include <algorithm>
#include <stdexcept>

namespace fastkd {
namespace {

// The gene of the channel of another value that channel c of a list is, or else the channel's own.
std::int32_t listed_gene(const Program& program, const Node& n, std::int64_t c) {
    if (n.kind == Operation::select) {
        const std::int32_t input = n.select[std::size_t(2 * c)], channel = n.select[std::size_t(2 * c + 1)];
        if (input >= 0) return program.value(n.inputs[std::size_t(input)]).genes[std::size_t(channel)];
    }
    if (n.kind == Operation::flatten) {
        const Value& in = program.value(n.inputs[0]);
        return in.genes[std::size_t(c / (in.height * in.width))];
    }
    return program.value(n.output).genes[std::size_t(c)];
}

// Products for one image.
std::int64_t work_of(const Program& program, const Node& n) {
    const Value& out = program.value(n.output);
    const std::int64_t inputs =
        n.kind == Operation::conv ? program.value(n.inputs[0]).channels / n.groups : 1;
    return out.channels * out.height * out.width * inputs *
           std::max<std::int64_t>(n.kernel[0] * n.kernel[1], 1);
}

Schedule scheduled(const Program& program, bool keep_batch) {
    Schedule s = fuse(program, keep_batch);
    order_genes(program, s);
    end_values(program, s);
    return s;
}

}  // namespace

std::vector<int> Step::reads() const {
    std::vector<int> values = node.inputs;
    if (residual >= 0) values.push_back(residual);
    return values;
}

Program::Program(DType dtype, std::int64_t genes, std::vector<Value> values_, std::vector<Node> nodes_,
                 int output)
    : dtype(dtype), genes(genes), values(std::move(values_)), nodes(std::move(nodes_)), output(output) {
    for (const Node& n : nodes) {
        const auto& expected = value(n.output).genes;
        for (std::size_t c = 0; c < expected.size(); ++c)
            if (listed_gene(*this, n, std::int64_t(c)) != expected[c])
                throw std::invalid_argument("network: a channel that is selected keeps its gene");
        norm_of.push_back(n.kind == Operation::norm ? int(norms++) : -1);
        work += work_of(*this, n);
    }
    inherit = scheduled(*this, false);
    recalibrate = scheduled(*this, true);
}

bool Program::by_channel(const Node& n) const {
    return n.kind != Operation::conv ||
           (n.groups == value(n.inputs[0]).channels && n.groups == value(n.output).channels);
}

Outline Program::outline() const {
    const Schedule& s = inherit;
    Outline o{s.order, s.producer, {}};
    for (const Step& step : s.steps) o.seen.push_back(step.seen);
    return o;
}

Affine affine_of(const NetworkRun& run, const Step& step) {
    if (run.affines && run.affines[step.norm].scale) return run.affines[step.norm];
    return {step.affine->scale, step.affine->shift, 0};
}

}  // namespace fastkd
