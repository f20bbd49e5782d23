// The Python module gtpo_kernels._cpu: numpy buffers of the exact dtype in, new float64 buffers out.  Logits come by address,
// because numpy has no bfloat16.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>

#include "clipped_loss.h"
#include "gtpo_loss.h"
#include "token_logprobs.h"
#include "turn_advantages.h"

namespace py = pybind11;

namespace {

using Doubles = py::array_t<double, py::array::c_style>;
using Ints = py::array_t<std::int64_t, py::array::c_style>;
using Bools = py::array_t<bool, py::array::c_style>;
using Floats = py::array_t<float, py::array::c_style>;

void raise_if_bad(gtpo::Status status, std::int64_t num_turns) {
    switch (status) {
        case gtpo::Status::ok: return;
        case gtpo::Status::bad_cu_turns: throw py::value_error("cu_turns must rise from 0 to the number of turns");
        case gtpo::Status::bad_turn_id: 
            throw py::value_error("turn_ids must lie in [-1, " + std::to_string(num_turns) + "), got a value outside");
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
    raise_if_bad(status, turns.num_turns);
    return returns;
}

template <class T>
std::tuple<py::array_t<T>, Doubles, Doubles> turn_advantages(const Doubles& turn_rewards, const Ints& cu_turns,
                                                             const Ints& group_ids, const Ints& turn_ids,
                                                             const std::optional<Ints>& anchor_ids,
                                                             const gtpo::CreditRule& rule) {
    const gtpo::Turns turns = turns_of(turn_rewards, cu_turns);
    check_length("group_ids", group_ids, cu_turns.size() - 1);
    check_length("turn_ids", turn_ids, turn_ids.size());
    if (anchor_ids) check_length("anchor_ids", *anchor_ids, turn_rewards.size());
    if (rule.scope == gtpo::Scope::group_anchor && !anchor_ids) throw py::value_error("anchor_ids must be given");
    const gtpo::Tokens tokens{turn_ids.data(), turn_ids.size()};
    py::array_t<T> of_tokens(turn_ids.size());
    Doubles of_turns(turn_rewards.size()), returns(turn_rewards.size());
    T* token_out = of_tokens.mutable_data();
    double *turn_out = of_turns.mutable_data(), *return_out = returns.mutable_data();
    const gtpo::ScopeIds ids{group_ids.data(), anchor_ids ? anchor_ids->data() : nullptr};
    gtpo::Status status;
    {
        py::gil_scoped_release release;
        status = gtpo::turn_advantages_cpu(turns, ids, tokens, rule, return_out, turn_out, token_out);
    }
    raise_if_bad(status, turns.num_turns);
    return {of_tokens, of_turns, returns};
}

void raise_if_bad(gtpo::SweepStatus status) {
    switch (status) {
        case gtpo::SweepStatus::ok: return;
        case gtpo::SweepStatus::bad_row: throw py::value_error("rows must lie in [0, number of rows of the logits)");
        case gtpo::SweepStatus::bad_target: throw py::value_error("targets must lie in [0, vocab)");
        case gtpo::SweepStatus::bad_layout:
            throw py::value_error("logits must be contiguous rows, or columns in place with room for whole vectors");
    }
}

gtpo::Logits logits_at(std::uintptr_t data, gtpo::LogitType type, std::int64_t num_rows, std::int64_t vocab,
                       std::int64_t row_stride, std::int64_t vocab_stride) {
    if (num_rows < 0 || vocab < 1 || row_stride < 0 || vocab_stride < 0 || (data == 0 && num_rows > 0)) {
        throw py::value_error("logits must be [N, V] in memory, V at least 1");
    }
    return {reinterpret_cast<void*>(data), type, num_rows, vocab, row_stride, vocab_stride};
}

// None, or the data of an array of the given length.
template <class Array>
auto data_of(const char* name, const std::optional<Array>& array, py::ssize_t length) -> decltype(array->data()) {
    if (!array) return nullptr;
    check_length(name, *array, length);
    return array->data();
}

gtpo::RowBatch batch_of(const std::optional<Ints>& rows, const Ints& targets, const std::optional<Doubles>& temperature,
                        double softcap) {
    const py::ssize_t count = targets.size();
    check_length("targets", targets, count);
    return {count, data_of("rows", rows, count), targets.data(), data_of("temperature", temperature, count), softcap};
}

Doubles statistics_for(const Ints& targets) {
    static_assert(sizeof(gtpo::RowStatistics) == 4 * sizeof(double));
    return Doubles({targets.size(), py::ssize_t{4}});
}

Doubles token_statistics(const gtpo::Logits& logits, const std::optional<Ints>& rows, const Ints& targets,
                         const std::optional<Doubles>& temperature, double softcap, std::int64_t num_threads) {
    const gtpo::RowBatch batch = batch_of(rows, targets, temperature, softcap);
    Doubles statistics = statistics_for(targets);
    auto* out = reinterpret_cast<gtpo::RowStatistics*>(statistics.mutable_data());
    gtpo::SweepStatus status;
    {
        py::gil_scoped_release release;
        status = gtpo::sweep_rows_cpu(logits, nullptr, batch, out, nullptr, nullptr, false, num_threads);
    }
    raise_if_bad(status);
    return statistics;
}

struct UpstreamRows {
    const double* logprobs;
    const double* entropy;
};

gtpo::RowUpstream upstream_of(const void* data, std::int64_t i, const gtpo::RowStatistics&) {
    const auto& rows = *static_cast<const UpstreamRows*>(data);
    return {rows.logprobs[i], rows.entropy == nullptr ? 0.0 : rows.entropy[i]};
}

void token_gradient(const gtpo::Logits& logits, const gtpo::Logits& d_logits, const std::optional<Ints>& rows,
                    const Ints& targets, const std::optional<Doubles>& temperature, double softcap,
                    const Doubles& grad_logprobs, const std::optional<Doubles>& grad_entropy, std::int64_t num_threads) {
    const gtpo::RowBatch batch = batch_of(rows, targets, temperature, softcap);
    check_length("grad_logprobs", grad_logprobs, targets.size());
    const UpstreamRows upstream{grad_logprobs.data(), data_of("grad_entropy", grad_entropy, targets.size())};
    Doubles statistics = statistics_for(targets);
    auto* out = reinterpret_cast<gtpo::RowStatistics*>(statistics.mutable_data());
    gtpo::SweepStatus status;
    {
        py::gil_scoped_release release;
        status = gtpo::sweep_rows_cpu(logits, &d_logits, batch, out, upstream_of, &upstream, upstream.entropy != nullptr,
                                      num_threads);
    }
    raise_if_bad(status);
}

Doubles gtpo_loss(const gtpo::Logits& logits, const std::optional<gtpo::Logits>& d_logits, const std::optional<Ints>& rows,
                  const Ints& targets, const std::optional<Doubles>& temperature, double softcap, const Doubles& advantages,
                  const std::optional<Doubles>& old_logprobs, double denominator, double clip_low, double clip_high,
                  std::int64_t num_threads) {
    const gtpo::RowBatch batch = batch_of(rows, targets, temperature, softcap);
    check_length("advantages", advantages, targets.size());
    const gtpo::LossRows loss{advantages.data(), data_of("old_logprobs", old_logprobs, targets.size()),
                              {clip_low, clip_high, denominator}};
    Doubles statistics = statistics_for(targets);
    auto* out = reinterpret_cast<gtpo::RowStatistics*>(statistics.mutable_data());
    gtpo::SweepStatus status;
    {
        py::gil_scoped_release release;
        status = gtpo::gtpo_loss_cpu(logits, d_logits ? &*d_logits : nullptr, batch, loss, out, num_threads);
    }
    raise_if_bad(status);
    return statistics;
}

std::tuple<double, Doubles, Doubles> clipped_loss(const Doubles& logprobs, const Doubles& advantages,
                                                  const Bools& loss_mask, const std::optional<Doubles>& old_logprobs,
                                                  const std::optional<Doubles>& entropy, double denominator,
                                                  double clip_low, double clip_high, bool all_metrics,
                                                  bool need_gradient) {
    const py::ssize_t count = logprobs.size();
    check_length("logprobs", logprobs, count);
    check_length("advantages", advantages, count);
    check_length("loss_mask", loss_mask, count);
    const gtpo::LossTokens tokens{count,
                                  logprobs.data(),
                                  advantages.data(),
                                  loss_mask.data(),
                                  data_of("old_logprobs", old_logprobs, count),
                                  data_of("entropy", entropy, count)};
    Doubles metrics(gtpo::num_loss_metrics), d_logprobs(need_gradient ? count : 0);
    double *metrics_out = metrics.mutable_data(), *slopes_out = need_gradient ? d_logprobs.mutable_data() : nullptr;
    double loss;
    {
        py::gil_scoped_release release;
        gtpo::clipped_loss_cpu(tokens, {clip_low, clip_high, denominator}, all_metrics, &loss, metrics_out, slopes_out);
    }
    return {loss, metrics, d_logprobs};
}

template <void (*gtpo::Kernels::*function)(const float*, float*, std::int64_t)>
Floats map(const Floats& x) {
    Floats out(x.size());
    (gtpo::kernels().*function)(x.data(), out.mutable_data(), x.size());
    return out;
}

void set_instruction_set(gtpo::InstructionSet set) {
    const auto sets = gtpo::instruction_sets();
    if (std::find(sets.begin(), sets.end(), set) == sets.end()) {
        throw py::value_error("this machine does not run that instruction set");
    }
    gtpo::set_instruction_set(set);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "Compiled CPU kernels of gtpo_kernels.";
    py::enum_<gtpo::Scope>(m, "Scope")
        .value("group", gtpo::Scope::group)
        .value("batch", gtpo::Scope::batch)
        .value("group_turn", gtpo::Scope::group_turn)
        .value("group_anchor", gtpo::Scope::group_anchor)
        .value("none", gtpo::Scope::none);
    py::enum_<gtpo::Population>(m, "Population")
        .value("turns", gtpo::Population::turns)
        .value("trajectories", gtpo::Population::trajectories)
        .value("tokens", gtpo::Population::tokens);
    py::enum_<gtpo::Centre>(m, "Centre")
        .value("mean", gtpo::Centre::mean)
        .value("leave_one_out", gtpo::Centre::leave_one_out)
        .value("none", gtpo::Centre::none);
    py::class_<gtpo::CreditRule>(m, "CreditRule")
        .def(py::init<double, double, bool, gtpo::Scope, gtpo::Population, gtpo::Centre, bool, std::int64_t, double, bool>(),
             py::kw_only(), py::arg("gamma_before"), py::arg("gamma_after"), py::arg("per_trajectory"), py::arg("scope"),
             py::arg("population"), py::arg("centre"), py::arg("divides"), py::arg("ddof"), py::arg("eps"),
             py::arg("keeps_alone"));
    // noconvert: a wrong dtype is an error of the caller, not a silent copy
    m.def("turn_returns", &turn_returns, py::arg("turn_rewards").noconvert(), py::arg("cu_turns").noconvert(),
          py::arg("gamma"));
    // two functions of one signature, for what the tokens' advantages are rounded to
    const auto def_turn_advantages = [&](const char* name, auto function) {
        m.def(name, function, py::arg("turn_rewards").noconvert(), py::arg("cu_turns").noconvert(),
              py::arg("group_ids").noconvert(), py::arg("turn_ids").noconvert(), py::arg("anchor_ids").noconvert(),
              py::arg("rule"));
    };
    def_turn_advantages("turn_advantages_float32", &turn_advantages<float>);
    def_turn_advantages("turn_advantages", &turn_advantages<double>);

    py::enum_<gtpo::InstructionSet>(m, "InstructionSet")
        .value("portable", gtpo::InstructionSet::portable)
        .value("avx2", gtpo::InstructionSet::avx2)
        .value("avx512", gtpo::InstructionSet::avx512);
    m.def("instruction_sets", &gtpo::instruction_sets);
    m.def("instruction_set", &gtpo::instruction_set);
    m.def("set_instruction_set", &set_instruction_set, py::arg("set"));
    m.def("exp", &map<&gtpo::Kernels::exp>, py::arg("x").noconvert());
    m.def("tanh", &map<&gtpo::Kernels::tanh>, py::arg("x").noconvert());

    py::enum_<gtpo::LogitType>(m, "LogitType")
        .value("float32", gtpo::LogitType::float32)
        .value("bfloat16", gtpo::LogitType::bfloat16)
        .value("float64", gtpo::LogitType::float64);
    py::class_<gtpo::Logits>(m, "Logits")
        .def(py::init(&logits_at), py::kw_only(), py::arg("data"), py::arg("type"), py::arg("num_rows"), py::arg("vocab"),
             py::arg("row_stride"), py::arg("vocab_stride"));
    m.def("token_statistics", &token_statistics, py::arg("logits"), py::arg("rows").noconvert(),
          py::arg("targets").noconvert(), py::arg("temperature").noconvert(), py::kw_only(), py::arg("softcap"),
          py::arg("num_threads"));
    m.def("token_gradient", &token_gradient, py::arg("logits"), py::arg("d_logits"), py::arg("rows").noconvert(),
          py::arg("targets").noconvert(), py::arg("temperature").noconvert(), py::kw_only(), py::arg("softcap"),
          py::arg("grad_logprobs").noconvert(), py::arg("grad_entropy").noconvert(), py::arg("num_threads"));
    m.def("gtpo_loss", &gtpo_loss, py::arg("logits"), py::arg("d_logits"), py::arg("rows").noconvert(),
          py::arg("targets").noconvert(), py::arg("temperature").noconvert(), py::kw_only(), py::arg("softcap"),
          py::arg("advantages").noconvert(), py::arg("old_logprobs").noconvert(), py::arg("denominator"),
          py::arg("clip_low"), py::arg("clip_high"), py::arg("num_threads"));
    m.def("clipped_loss", &clipped_loss, py::arg("logprobs").noconvert(), py::arg("advantages").noconvert(),
          py::arg("loss_mask").noconvert(), py::arg("old_logprobs").noconvert(), py::arg("entropy").noconvert(),
          py::kw_only(), py::arg("denominator"), py::arg("clip_low"), py::arg("clip_high"), py::arg("all_metrics"),
          py::arg("need_gradient"));
}
