// How long values live.
#include <algorithm>
#include <limits>

#include "network/schedule.h"

namespace fastkd {

void end_values(const Program& program, Schedule& s) {
    std::vector<int> last(program.values.size(), -1);
    for (std::size_t k = 0; k < s.steps.size(); ++k)
        for (int v : s.steps[k].reads()) last[std::size_t(v)] = int(k);
    for (std::size_t v = 0; v < program.values.size(); ++v) {
        if (int(v) == program.output || (v != 0 && s.producer[v] < 0)) continue;
        // A value that is fused away has a producer but is read by no step.
        const int at = std::max(last[v], s.producer[v]);
        if (at >= 0) s.steps[std::size_t(at)].dying.push_back(int(v));
    }
}

std::vector<Lifetime> lifetimes(const Program& program, const Schedule& s) {
    constexpr int never = std::numeric_limits<int>::max();
    std::vector<Lifetime> lives(program.values.size(), {never, -1});
    lives[0].made = -1;
    const int steps = int(s.steps.size());
    for (int k = 0; k < steps; ++k) {
        const Step& step = s.steps[std::size_t(k)];
        for (int v : step.dying) lives[std::size_t(v)].dies = k;
        lives[std::size_t(step.node.output)].made = k;
    }
    lives[std::size_t(program.output)].dies = steps;
    for (int k = steps; k-- > 0;) {
        const Step& step = s.steps[std::size_t(k)];
        if (!step.is_list()) continue;
        Lifetime& list = lives[std::size_t(step.node.output)];
        for (int v : step.node.inputs)
            lives[std::size_t(v)].dies = std::max(lives[std::size_t(v)].dies, list.dies);
        list = {never, -1};
    }
    return lives;
}

}  // namespace fastkd
