// The order in which genes are met, how many of them each step depends on, and individuals sorted by it.
#include <algorithm>
#include <cstring>
#include <numeric>

#include "network/schedule.h"

namespace fastkd {
namespace {

class GeneOrder {
  public:
    GeneOrder(const Program& program, Schedule& s)
        : program_(program),
          s_(s),
          met_(program.values.size(), 0),
          depends_(program.values.size(), 0),
          known_(std::size_t(program.genes), 0) {}

    void operator()() {
        meet(0);
        std::int64_t seen = 0;
        for (Step& step : s_.steps) {
            seen = std::max(seen, read_by(step));
            step.seen = depends_[std::size_t(step.node.output)] = seen;
            meet(step.node.output);
        }
        for (std::size_t g = 0; g < known_.size(); ++g)
            if (!known_[g]) s_.order.push_back(std::int32_t(g));
    }

  private:
    // Appends the genes of a value that are new.
    void meet(int v) {
        for (std::int32_t g : program_.value(v).genes)
            if (g >= 0 && !known_[std::size_t(g)]) known_[std::size_t(g)] = 1, s_.order.push_back(g);
        met_[std::size_t(v)] = std::int64_t(s_.order.size());
    }

    // Genes on which the planes depend that a step reads; all of a value where a channel mixes others.
    std::int64_t read_by(const Step& step) const {
        const std::vector<int> reads = step.reads();
        std::int64_t seen = 0;
        for (std::size_t i = 0; i < reads.size(); ++i) {
            const std::size_t v = std::size_t(reads[i]);
            const bool main = i < step.node.inputs.size();  // the residual may be the same value
            const bool alone = (!main || program_.by_channel(step.node)) && keeps_genes(step, reads[i]);
            seen = std::max({seen, depends_[v], alone ? 0 : met_[v]});
        }
        return seen;
    }

    // Does channel c of the result have the gene of channel c of v, wherever that one has a gene? A list
    // of channels has the genes of what it lists: Program checks it.
    bool keeps_genes(const Step& step, int v) const {
        if (step.is_list()) return true;
        const auto &in = program_.value(v).genes, &out = program_.value(step.node.output).genes;
        for (std::size_t c = 0; c < out.size(); ++c)
            if (in[c] != out[c] && in[c] >= 0) return false;
        return true;
    }

    const Program& program_;
    Schedule& s_;
    std::vector<std::int64_t> met_;      // genes up to those of each value
    std::vector<std::int64_t> depends_;  // genes that each value's planes depend on
    std::vector<char> known_;
};

}  // namespace

void order_genes(const Program& program, Schedule& s) { GeneOrder(program, s)(); }

Sorted::Sorted(const Program& program, const Schedule& s, const std::uint8_t* masks, std::int64_t individuals)
    : program(program),
      masks(masks),
      individual(std::size_t(individuals), 0),
      agree(std::size_t(individuals), 0) {
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

std::vector<Column> Sorted::wanted(int v, std::int64_t begin, std::int64_t end) const {
    std::vector<Column> columns;
    const auto& genes = program.value(v).genes;
    for (std::size_t c = 0; c < genes.size(); ++c)
        for (std::int64_t k = begin; k < end; ++k)
            if (kept(k, genes[c])) {
                columns.push_back({std::int32_t(c), std::int32_t(k)});
                break;
            }
    return columns;
}

}  // namespace fastkd
