// A whole population through one network on the GPU: layer by layer, all individuals at once.
//
// The host plans: individuals are sorted as on the CPU, neighbours that agree on what a layer depends on
// form a group, and a layer is one launch over all groups. A group computes the channels that any of its
// individuals keeps. Where a group parts, a convolution first copies the channels that each part keeps
// side by side; all other layers reach every channel by its own address. The order of channels in memory,
// and with it that of every sum, depends on the individual's own mask alone.
#include "network/cuda/execution.cuh"

namespace fastkd::cuda {

Network::Network(DType dtype, std::int64_t genes, std::vector<Value> values, std::vector<Node> nodes,
                 int output)
    : program_(new Program(dtype, genes, std::move(values), std::move(nodes), output)) {}
Network::~Network() = default;

std::int64_t Network::norms() const { return program_->norms; }

Outline Network::outline() const { return program_->outline(); }

void Network::run(const NetworkRun& run, bool tf32, Memory& memory, void* stream) const {
    if (run.individuals && run.images) Execution(*program_, run, tf32, memory, stream)();
}

namespace {

// As if nothing were shared and nothing masked, and every input of a convolution copied.
class Estimate {
  public:
    Estimate(const Program& program, std::int64_t images)
        : program_(program),
          images_(images),
          size_(size_of(program.dtype)),
          pad_(kPadBytes / size_),
          held_(program.values.size(), 0),
          listed_(program.values.size(), false) {}

    std::int64_t operator()(const Schedule& s, bool recalibrate) {
        // What a view without memory of its own shows lives as long as it does; here, for ever.
        for (const Step& step : s.steps)
            if (step.is_list())
                for (int v : step.node.inputs) listed_[std::size_t(v)] = true;
        hold(0);
        std::int64_t most = live_;
        for (const Step& step : s.steps) {
            if (step.node.kind == Operation::conv) hold(step.node.inputs[0]);
            if (!step.is_list()) hold(step.node.output);
            most = std::max(most, live_ + passing(step.node, recalibrate));
            for (int v : step.dying)
                if (!listed_[std::size_t(v)]) live_ -= held_[std::size_t(v)];
        }
        return most;
    }

  private:
    void hold(int v) {
        const Value& shape = program_.value(v);
        const std::int64_t bytes =
            round_up(images_ * shape.height * shape.width * round_up(shape.channels, pad_) * size_, kAlign);
        held_[std::size_t(v)] += bytes, live_ += bytes;
    }

    // Lists, packed weights and partial sums: what a step needs while it runs.
    std::int64_t passing(const Node& n, bool recalibrate) const {
        const Value& out = program_.value(n.output);
        std::int64_t bytes = 256 * (out.channels + 4);
        if (n.kind == Operation::conv) {
            const Value& in = program_.value(n.inputs[0]);
            const std::int64_t depth = n.kernel[0] * n.kernel[1] * round_up(in.channels / n.groups, pad_);
            bytes += 256 * in.channels + size_ * out.channels * (round_up(depth, kChunkBytes) + kAlign);
        }
        if (recalibrate && n.kind == Operation::norm)
            bytes += 8 * out.channels * ceil_div(images_ * out.height * out.width, kPiece);
        return bytes;
    }

    const Program& program_;
    const std::int64_t images_, size_, pad_;
    std::vector<std::int64_t> held_;  // by each value, with its copies
    std::vector<char> listed_;
    std::int64_t live_ = 0;
};

}  // namespace

std::int64_t Network::bytes(std::int64_t images, bool recalibrate, std::int64_t individuals) const {
    const Schedule& s = recalibrate ? program_->recalibrate : program_->inherit;
    return individuals * Estimate(*program_, images)(s, recalibrate);
}

}  // namespace fastkd::cuda
