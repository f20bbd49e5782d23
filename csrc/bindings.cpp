// The Python module gtpo_kernels._cpu: numpy buffers of the exact dtype in, new float64 buffers out.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "turn_advantages.h"

namespace py = pybind11;

namespace {

using Doubles = py::array_t<double, py::array::c_style>;
using Ints = py::array_t<std::int64_t, py::array::c_style>;

void raise_if_bad(gtpo::Status status) {
    switch (status) {
        case gtpo::Status::ok: return;
        case gtpo::Status::bad_cu_turns: throw py::value_error("cu_turns must rise from 0 to the number of turns");
        case gtpo::Status::bad_turn_id: throw py::value_error("turn_ids must lie in [-1, number of turns)");
    }
}

void check_length(const char* name, const py::array& array, py::ssize_t length) {
    if (array.ndim() != 1 || array.shape(0) != length) {
        throw py::value_error(std::string(name) + " must be [" + std::to_string(length) + "]");
    }
}

gtpo::Turns turns_of(const Doubles& turn_rewards, const Ints& cu_turns) {
    check_length("turn_rewards", turn_rewards, turn_rewards.size());
    check_length("cu_turns", cu_turns, cu_turns.size());
    if (cu_turns.size() < 1) throw py::value_error("cu_turns must be [B+1], got no entry");
    return {turn_rewards.data(), cu_turns.data(), turn_rewards.size(), cu_turns.size() - 1};
}

Doubles turn_returns(const Doubles& turn_rewards, const Ints& cu_turns, double gamma) {
    const gtpo::Turns turns = turns_of(turn_rewards, cu_turns);
    Doubles returns(turn_rewards.size());
    double* out = returns.mutable_data();
    gtpo::Status status;
    {
        py::gil_scoped_release release;
        status = gtpo::turn_returns_cpu(turns, gamma, out);
    }
    raise_if_bad(status);
    return returns;
}

std::tuple<Doubles, Doubles, Doubles> turn_advantages(const Doubles& turn_rewards, const Ints& cu_turns,
                                                      const Ints& group_ids, const Ints& turn_ids, double gamma,
                                                      gtpo::Scope scope, gtpo::Population population, std::int64_t ddof,
                                                      double eps) {
    const gtpo::Turns turns = turns_of(turn_rewards, cu_turns);
    check_length("group_ids", group_ids, cu_turns.size() - 1);
    check_length("turn_ids", turn_ids, turn_ids.size());
    const gtpo::Tokens tokens{turn_ids.data(), turn_ids.size()};
    Doubles of_tokens(turn_ids.size()), of_turns(turn_rewards.size()), returns(turn_rewards.size());
    double *token_out = of_tokens.mutable_data(), *turn_out = of_turns.mutable_data(), *return_out = returns.mutable_data();
    const std::int64_t* groups = group_ids.data();
    gtpo::Status status;
    {
        py::gil_scoped_release release;
        status = gtpo::turn_advantages_cpu(turns, groups, tokens, {gamma, scope, population, ddof, eps}, return_out,
                                           turn_out, token_out);
    }
    raise_if_bad(status);
    return {of_tokens, of_turns, returns};
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "Compiled CPU kernels of gtpo_kernels.";
    py::enum_<gtpo::Scope>(m, "Scope")
        .value("group", gtpo::Scope::group)
        .value("batch", gtpo::Scope::batch)
        .value("group_turn", gtpo::Scope::group_turn)
        .value("none", gtpo::Scope::none);
    py::enum_<gtpo::Population>(m, "Population")
        .value("turns", gtpo::Population::turns)
        .value("trajectories", gtpo::Population::trajectories);
    // noconvert: a wrong dtype is an error of the caller, not a silent copy
    m.def("turn_returns", &turn_returns, py::arg("turn_rewards").noconvert(), py::arg("cu_turns").noconvert(),
          py::arg("gamma"));
    m.def("turn_advantages", &turn_advantages, py::arg("turn_rewards").noconvert(), py::arg("cu_turns").noconvert(),
          py::arg("group_ids").noconvert(), py::arg("turn_ids").noconvert(), py::kw_only(), py::arg("gamma"),
          py::arg("scope"), py::arg("population"), py::arg("ddof"), py::arg("eps"));
}
