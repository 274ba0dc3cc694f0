#include "network/schedule.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>

namespace fastkd {

// Does channel c of the result read no other channel than c?
bool by_channel(const Node& n, const Value& in, const Value& out) {
    return n.kind != Operation::conv || (n.groups == in.channels && n.groups == out.channels);
}

namespace {

// Does channel c of the result have other genes than channel c of the value it is made from?
bool same_genes(const std::vector<std::int32_t>& in, const std::vector<std::int32_t>& out) {
    for (std::size_t c = 0; c < out.size(); ++c)
        if (in[c] != out[c] && in[c] >= 0) return false;
    return true;
}

// Do channels that are the same planes as others have their genes?
bool same_sources(const Node& n, const std::vector<Value>& values) {
    const Value& out = values[std::size_t(n.output)];
    for (std::int64_t c = 0; c < out.channels; ++c) {
        std::int32_t gene = out.genes[std::size_t(c)];
        if (n.kind == Operation::select && n.select[std::size_t(2 * c)] >= 0)
            gene = values[std::size_t(n.inputs[std::size_t(n.select[std::size_t(2 * c)])])]
                       .genes[std::size_t(n.select[std::size_t(2 * c + 1)])];
        if (n.kind == Operation::flatten) {
            const Value& in = values[std::size_t(n.inputs[0])];
            gene = in.genes[std::size_t(c / (in.height * in.width))];
        }
        if (gene != out.genes[std::size_t(c)]) return false;
    }
    return true;
}

}  // namespace

Schedule Program::schedule(bool keep_batch) const {
    Schedule s;
    std::vector<int> uses(values.size(), 0), made(values.size(), -1);
    for (const Node& n : nodes)
        for (int v : n.inputs) ++uses[std::size_t(v)];
    ++uses[std::size_t(output)];
    auto fits = [&](int v, const Node& n, int stage) -> Step* {
        const int at = made[std::size_t(v)];
        if (at < 0 || uses[std::size_t(v)] != 1) return nullptr;
        Step& step = s.steps[std::size_t(at)];
        const bool epilogue = step.node.kind == Operation::conv ||
                              (stage > 1 && step.node.kind == Operation::norm) ||
                              (stage > 2 && step.node.kind == Operation::add);
        const Value &in = values[std::size_t(v)], &out = values[std::size_t(n.output)];
        return epilogue && step.stage < stage && in.genes == out.genes ? &step : nullptr;
    };
    auto fuse = [&](std::size_t k) -> Step* {
        const Node& n = nodes[k];
        if (n.kind == Operation::norm && !(keep_batch && n.batch)) {
            if (Step* step = fits(n.inputs[0], n, 1)) {
                step->norm = norm_of[k], step->affine = &n, step->stage = 1;
                return step;
            }
        }
        if (n.kind == Operation::activation) {
            if (Step* step = fits(n.inputs[0], n, 3)) {
                step->activation = n.activation, step->param = n.param, step->stage = 3;
                return step;
            }
        }
        if (n.kind == Operation::add && n.inputs.size() == 2) {
            for (int k = 0; k < 2; ++k) {
                const int v = n.inputs[std::size_t(k)], other = n.inputs[std::size_t(1 - k)];
                Step* step = fits(v, n, 2);
                if (!step || made[std::size_t(other)] >= made[std::size_t(v)]) continue;
                step->residual = other, step->stage = 2;
                return step;
            }
        }
        return nullptr;
    };
    for (std::size_t k = 0; k < nodes.size(); ++k) {
        Step* step = fuse(k);
        if (!step) {
            Step own;
            own.node = nodes[k];
            if (nodes[k].kind == Operation::norm)
                own.norm = norm_of[k], own.affine = &nodes[k], own.stage = 1;
            if (nodes[k].kind == Operation::add) own.stage = 2;
            if (nodes[k].kind == Operation::activation)
                own.activation = nodes[k].activation, own.param = nodes[k].param, own.stage = 3;
            s.steps.push_back(std::move(own));
            step = &s.steps.back();
        }
        step->node.output = nodes[k].output;
        made[std::size_t(nodes[k].output)] = int(step - s.steps.data());
    }
    s.producer = made;

    std::vector<int> last(values.size(), -1);
    std::vector<std::int64_t> depends(values.size(), 0), met(values.size(), 0);
    std::vector<char> known(std::size_t(genes), 0);
    // Genes up to those of this value.
    auto meet = [&](int v) {
        for (std::int32_t g : values[std::size_t(v)].genes)
            if (g >= 0 && !known[std::size_t(g)]) known[std::size_t(g)] = 1, s.order.push_back(g);
        met[std::size_t(v)] = std::int64_t(s.order.size());
    };
    meet(0);
    std::int64_t seen = 0;
    for (std::size_t k = 0; k < s.steps.size(); ++k) {
        Step& step = s.steps[k];
        std::vector<int> reads = step.node.inputs;
        if (step.residual >= 0) reads.push_back(step.residual);
        const auto& genes = values[std::size_t(step.node.output)].genes;
        for (std::size_t i = 0; i < reads.size(); ++i) {
            const int v = reads[i];
            last[std::size_t(v)] = int(k);
            const bool main = i < step.node.inputs.size();  // the residual may be the same value
            const bool shape = step.node.kind == Operation::select || step.node.kind == Operation::flatten;
            bool own =
                !main || by_channel(step.node, values[std::size_t(v)], values[std::size_t(step.node.output)]);
            // The list of channels itself may tie a channel to another gene than its own.
            own = own && (shape || same_genes(values[std::size_t(v)].genes, genes));
            seen = std::max({seen, depends[std::size_t(v)], own ? 0 : met[std::size_t(v)]});
        }
        if (step.node.kind == Operation::norm && step.node.batch) s.measured = k + 1;
        step.seen = depends[std::size_t(step.node.output)] = seen;
        meet(step.node.output);
    }
    for (std::size_t v = 0; v < values.size(); ++v)
        if (int(v) != output && (v == 0 || s.producer[v] >= 0)) {
            // Fused away values have a producer but no planes of their own.
            const int at = std::max(last[v], s.producer[v]);
            if (at >= 0) s.steps[std::size_t(at)].dying.push_back(int(v));
        }
    for (std::size_t g = 0; g < known.size(); ++g)
        if (!known[g]) s.order.push_back(std::int32_t(g));
    return s;
}

Program::Program(DType dtype, std::int64_t genes, std::vector<Value> values_, std::vector<Node> nodes_,
                 int output)
    : dtype(dtype), genes(genes), values(std::move(values_)), nodes(std::move(nodes_)), output(output) {
    for (const Node& n : nodes)
        if (!same_sources(n, values))
            throw std::invalid_argument("network: a channel that is selected keeps its gene");
    for (const Node& n : nodes) norm_of.push_back(n.kind == Operation::norm ? int(norms++) : -1);
    for (const Node& n : nodes) {
        const Value& out = values[std::size_t(n.output)];
        const std::int64_t inputs =
            n.kind == Operation::conv ? values[std::size_t(n.inputs[0])].channels / n.groups : 1;
        work += out.channels * out.height * out.width * inputs *
                std::max<std::int64_t>(n.kernel[0] * n.kernel[1], 1);
    }
    inherit = schedule(false);
    recalibrate = schedule(true);
}

Outline Program::outline() const {
    const Schedule& s = inherit;
    Outline o{s.order, s.producer, {}};
    for (const Step& step : s.steps) o.seen.push_back(step.seen);
    return o;
}

Sorted::Sorted(const Program& program, const Schedule& s, const std::uint8_t* masks, std::int64_t individuals)
    : individual(std::size_t(individuals), 0), agree(std::size_t(individuals), 0) {
    const std::int64_t genes = program.genes;
    std::vector<std::uint8_t> key(std::size_t(individuals * genes));
    for (std::int64_t i = 0; i < individuals; ++i)
        for (std::int64_t g = 0; g < genes; ++g)
            key[std::size_t(i * genes + g)] = masks[i * genes + s.order[std::size_t(g)]] ? 1 : 0;
    std::iota(individual.begin(), individual.end(), std::int64_t(0));
    std::stable_sort(individual.begin(), individual.end(), [&](std::int64_t a, std::int64_t b) {
        return std::memcmp(key.data() + a * genes, key.data() + b * genes, std::size_t(genes)) < 0;
    });
    for (std::int64_t k = 1; k < individuals; ++k) {
        const std::uint8_t* a = key.data() + individual[std::size_t(k - 1)] * genes;
        const std::uint8_t* b = key.data() + individual[std::size_t(k)] * genes;
        agree[std::size_t(k)] = std::mismatch(a, a + genes, b).first - a;
    }
}

}  // namespace fastkd
