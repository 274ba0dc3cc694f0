// A whole population through one network.
//
// Individuals are sorted by their genes, in the order in which the network meets them, so that those
// which agree on the first layers are neighbours: they share the results of these layers, and each
// distinct beginning is computed once. A layer computes the channels that any of the individuals
// that share it wants; each then reads its own through pointers. The walk goes through all layers of one
// block of images before the next one, so that activations stay in the cache.
#include <atomic>
#include <mutex>

#include "common/parallel.h"
#include "network/cpu/walk.h"

namespace fastkd::cpu {

struct Network::Plan : Program {
    using Program::Program;
    mutable std::atomic<std::int64_t> taken{0};  // by the buffers of the last run
};

namespace {

struct Met {
    std::int64_t bytes, together;  // of a value, and the buffers that there are when it is made
};

// The values of a walk over `count` blocks. A value may be alive, or held for individuals that part from
// others later: what was alive where they part.
std::vector<Met> values_met(const Program& program, const Schedule& s, const ImageBlocks& blocks,
                            std::int64_t count, std::int64_t individuals) {
    const std::vector<Lifetime> lives = lifetimes(program, s);
    std::vector<char> held(lives.size(), 0);
    std::int64_t most_held = 0, seen = 0;
    // Marks what is alive where individuals part: they differ in a gene, or in a norm of their own.
    auto hold = [&](int k, const Step& step) {
        std::int64_t now = 0;
        if (step.norm >= 0 || step.seen > seen)
            for (std::size_t v = 0; v < lives.size(); ++v)
                if (lives[v].across(k)) held[v] = 1, ++now;
        most_held = std::max(most_held, now);
        seen = step.seen;
    };
    std::vector<Met> met;
    for (int k = -1; k < int(s.steps.size()); ++k) {
        if (k >= 0) hold(k, s.steps[std::size_t(k)]);
        const std::size_t made = k < 0 ? 0 : std::size_t(s.steps[std::size_t(k)].node.output);
        if (lives[made].made != k) continue;
        std::int64_t living = 1, waiting = 0, bytes = 0;
        for (std::size_t v = 0; v < lives.size(); ++v) {
            if (v == made) continue;
            if (lives[v].across(k)) ++living;
            else waiting += held[v];
        }
        for (std::int64_t b = 0; b < count; ++b)
            bytes += planes_bytes(program.values[made], blocks.padded(b), size_of(program.dtype));
        met.push_back({BufferPool::size(bytes), living + std::min(waiting, (individuals - 1) * most_held)});
    }
    return met;
}

// There are at most as many buffers as are needed together, and none is larger than the largest value met
// while there are so many.
std::int64_t most_bytes(std::vector<Met> met) {
    std::sort(met.begin(), met.end(), [](const Met& a, const Met& b) { return a.bytes > b.bytes; });
    std::int64_t total = 0, number = 0;
    for (const Met& m : met) {
        total += std::max<std::int64_t>(m.together - number, 0) * m.bytes;
        number = std::max(number, m.together);
    }
    return total;
}

// 0 and 1, for channels that do not exist.
void clear_moments(const Program& program, const NetworkRun& run) {
    for (std::size_t k = 0; k < program.nodes.size(); ++k) {
        if (program.norm_of[k] < 0) continue;
        const Moments& m = run.moments[program.norm_of[k]];
        const std::int64_t n = run.individuals * program.value(program.nodes[k].output).channels;
        std::fill_n(static_cast<double*>(m.mean), n, 0.0);
        std::fill_n(static_cast<double*>(m.variance), n, 1.0);
    }
}

// Pools of tasks that are done, for those that follow.
class Pools {
  public:
    std::unique_ptr<BufferPool> take() {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (pools_.empty()) return std::make_unique<BufferPool>();
        std::unique_ptr<BufferPool> pool = std::move(pools_.back());
        pools_.pop_back();
        return pool;
    }
    void give(std::unique_ptr<BufferPool> pool) {
        const std::lock_guard<std::mutex> lock(mutex_);
        pools_.push_back(std::move(pool));
    }
    // What all took at most.
    std::int64_t most() const {
        std::int64_t bytes = 0;
        for (const auto& pool : pools_) bytes += pool->most();
        return bytes;
    }

  private:
    std::mutex mutex_;
    std::vector<std::unique_ptr<BufferPool>> pools_;
};

}  // namespace

Network::Network(DType dtype, std::int64_t genes, std::vector<Value> values, std::vector<Node> nodes,
                 int output)
    : plan_(new Plan(dtype, genes, std::move(values), std::move(nodes), output)) {}
Network::~Network() = default;

std::int64_t Network::norms() const { return plan_->norms; }

Outline Network::outline() const { return plan_->outline(); }

std::int64_t Network::bytes(std::int64_t images, bool recalibrate, std::int64_t individuals,
                            int threads) const {
    const ImageBlocks blocks(images, size_of(plan_->dtype));
    const Schedule& s = recalibrate ? plan_->recalibrate : plan_->inherit;
    std::int64_t weights = 0;  // of a layer, as they are packed
    for (const Node& n : plan_->nodes)
        if (n.kind == Operation::conv)
            weights = std::max(weights, plan_->value(n.output).channels * plan_->value(n.inputs[0]).channels /
                                            n.groups * n.kernel[0] * n.kernel[1] * size_of(plan_->dtype));
    const std::int64_t count = recalibrate ? blocks.count : 1;
    // In a vector that may be twice as large.
    return threads * (most_bytes(values_met(*plan_, s, blocks, count, individuals)) + 2 * weights);
}

std::int64_t Network::taken() const { return plan_->taken; }

void Network::run(const NetworkRun& run, int threads) const {
    const Plan& plan = *plan_;
    const std::int64_t individuals = run.individuals;
    if (!individuals || !run.images) return;
    const Schedule& s = plan.schedule(run);
    threads = threads_for(plan.work * run.images * individuals / 8, threads);
    if (run.moments) clear_moments(plan, run);

    const Sorted sorted(plan, s, run.masks, individuals);
    // A task is a block of images, or all of them where a norm needs the whole batch, and some
    // neighbours: as few cuts between them as keep the threads busy.
    const ImageBlocks blocks(run.images, size_of(plan.dtype));
    const std::int64_t image_tasks = run.moments ? 1 : blocks.count, step = run.moments ? blocks.count : 1;
    std::int64_t ranges = 1;
    if (threads > 1 && image_tasks % threads) ranges = ceil_div(4 * threads, image_tasks);
    ranges = std::min(ranges, individuals);
    Pools pools;
    parallel_for(image_tasks * ranges, threads, [&](std::int64_t task) {
        const std::int64_t block = task / ranges, range = task % ranges;
        std::unique_ptr<BufferPool> pool = pools.take();
        {
            Walk walk(sorted, s, run, blocks, *pool, block * step, step);
            walk(individuals * range / ranges, individuals * (range + 1) / ranges);
        }
        pools.give(std::move(pool));
    });
    plan.taken = pools.most();
}

}  // namespace fastkd::cpu
