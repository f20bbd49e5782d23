// The Python module gtpo_kernels._cuda: addresses of device memory and sizes in, kernels enqueued on a stream.
// The callers in gtpo_kernels/*/kernel_cuda.py see to shapes, dtypes and contiguity.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "gtpo_loss_cuda.h"
#include "token_logprobs_cuda.h"
#include "turn_advantages_cuda.h"

namespace py = pybind11;

namespace {

// 0 is null
using Address = std::uintptr_t;

template <class T = void>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

void raise_if_failed(int status) {
    if (status != 0) throw std::runtime_error(std::string("CUDA: ") + gtpo::cuda_error_string(status));
}

gtpo::Logits logits_of(gtpo::DType dtype, Address data, std::int64_t stride, std::int64_t num_rows, std::int64_t vocab,
                       Address rows, Address targets, double temperature, Address row_temperature, double softcap) {
    return {dtype, pointer(data), stride, num_rows, vocab, pointer<std::int64_t>(rows), pointer<std::int64_t>(targets),
            temperature, pointer(row_temperature), softcap};
}

gtpo::RowStatistics statistics_of(Address logprobs, Address entropy, Address row_max, Address log_sum) {
    return {pointer(logprobs), pointer(entropy), pointer(row_max), pointer(log_sum)};
}

gtpo::DeviceIds ids_of(Address data, bool wide) { return {pointer(data), wide}; }

gtpo::DeviceTurns turns_of(Address turn_rewards, gtpo::DType dtype, const gtpo::DeviceIds& cu_turns, std::int64_t num_turns,
                           std::int64_t num_trajectories) {
    return {pointer(turn_rewards), dtype, cu_turns, num_turns, num_trajectories};
}

void token_logprobs(const gtpo::Logits& logits, const gtpo::RowStatistics& statistics, Address stream) {
    raise_if_failed(gtpo::token_logprobs_cuda(logits, statistics, pointer(stream)));
}

void token_logprobs_backward(const gtpo::Logits& logits, const gtpo::RowStatistics& statistics, Address grad_logprobs,
                             Address grad_entropy, Address d_logits, Address stream) {
    const gtpo::Upstream upstream{pointer(grad_logprobs), pointer(grad_entropy)};
    raise_if_failed(gtpo::token_logprobs_backward_cuda(logits, statistics, upstream, pointer(d_logits), pointer(stream)));
}

void gtpo_loss(const gtpo::Logits& logits, Address d_logits, Address loss_mask, Address advantages, Address old_logprobs,
               Address denominator, double clip_low, double clip_high, bool all_metrics, Address logprobs, Address entropy,
               Address stream) {
    const gtpo::LossSweep sweep{logits,
                                pointer(d_logits),
                                pointer<unsigned char>(loss_mask),
                                pointer(advantages),
                                pointer(old_logprobs),
                                pointer(denominator),
                                clip_low,
                                clip_high,
                                all_metrics,
                                pointer(logprobs),
                                pointer(entropy)};
    raise_if_failed(gtpo::gtpo_loss_cuda(sweep, pointer(stream)));
}

void turn_returns(const gtpo::DeviceTurns& turns, double gamma, Address returns, Address stream) {
    raise_if_failed(gtpo::turn_returns_cuda(turns, gamma, pointer<double>(returns), pointer(stream)));
}

void turn_advantages(const gtpo::DeviceTurns& turns, const gtpo::DeviceIds& group_ids, const gtpo::DeviceIds& turn_ids,
                     const gtpo::DeviceIds& anchor_ids, std::int64_t num_tokens, const gtpo::CreditRule& rule,
                     Address token_counts, Address exact_returns, Address exact_advantages, bool wide_results,
                     Address returns, Address of_turns, Address of_tokens, Address stream) {
    const gtpo::DeviceCredit credit{turns,
                                    group_ids,
                                    turn_ids,
                                    anchor_ids,
                                    num_tokens,
                                    rule,
                                    pointer<int>(token_counts),
                                    pointer<double>(exact_returns),
                                    pointer<double>(exact_advantages),
                                    wide_results,
                                    pointer(returns),
                                    pointer(of_turns),
                                    pointer(of_tokens)};
    raise_if_failed(gtpo::turn_advantages_cuda(credit, pointer(stream)));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "Compiled CUDA kernels of gtpo_kernels.";
    py::enum_<gtpo::DType>(m, "DType", py::module_local())
        .value("float32", gtpo::DType::float32)
        .value("float64", gtpo::DType::float64)
        .value("bfloat16", gtpo::DType::bfloat16)
        .value("float16", gtpo::DType::float16);
    py::enum_<gtpo::Scope>(m, "Scope", py::module_local())
        .value("group", gtpo::Scope::group)
        .value("batch", gtpo::Scope::batch)
        .value("group_turn", gtpo::Scope::group_turn)
        .value("group_anchor", gtpo::Scope::group_anchor)
        .value("none", gtpo::Scope::none);
    py::enum_<gtpo::Population>(m, "Population", py::module_local())
        .value("turns", gtpo::Population::turns)
        .value("trajectories", gtpo::Population::trajectories)
        .value("tokens", gtpo::Population::tokens);
    py::enum_<gtpo::Centre>(m, "Centre", py::module_local())
        .value("mean", gtpo::Centre::mean)
        .value("leave_one_out", gtpo::Centre::leave_one_out)
        .value("none", gtpo::Centre::none);
    py::class_<gtpo::CreditRule>(m, "CreditRule", py::module_local())
        .def(py::init<double, double, bool, gtpo::Scope, gtpo::Population, gtpo::Centre, bool, std::int64_t, double, bool>(),
             py::kw_only(), py::arg("gamma_before"), py::arg("gamma_after"), py::arg("per_trajectory"), py::arg("scope"),
             py::arg("population"), py::arg("centre"), py::arg("divides"), py::arg("ddof"), py::arg("eps"),
             py::arg("keeps_alone"));

    py::class_<gtpo::Logits>(m, "Logits", py::module_local())
        .def(py::init(&logits_of), py::kw_only(), py::arg("dtype"), py::arg("data"), py::arg("stride"), py::arg("num_rows"),
             py::arg("vocab"), py::arg("rows"), py::arg("targets"), py::arg("temperature"), py::arg("row_temperature"),
             py::arg("softcap"));
    py::class_<gtpo::RowStatistics>(m, "RowStatistics", py::module_local())
        .def(py::init(&statistics_of), py::arg("logprobs"), py::arg("entropy"), py::arg("row_max"), py::arg("log_sum"));
    py::class_<gtpo::DeviceIds>(m, "Ids", py::module_local()).def(py::init(&ids_of), py::arg("data"), py::arg("wide"));
    py::class_<gtpo::DeviceTurns>(m, "Turns", py::module_local())
        .def(py::init(&turns_of), py::kw_only(), py::arg("turn_rewards"), py::arg("dtype"), py::arg("cu_turns"),
             py::arg("num_turns"), py::arg("num_trajectories"));

    m.def("token_logprobs", &token_logprobs, py::arg("logits"), py::arg("statistics"), py::kw_only(), py::arg("stream"));
    m.def("token_logprobs_backward", &token_logprobs_backward, py::arg("logits"), py::arg("statistics"), py::kw_only(),
          py::arg("grad_logprobs"), py::arg("grad_entropy"), py::arg("d_logits"), py::arg("stream"));
    m.def("gtpo_loss", &gtpo_loss, py::arg("logits"), py::kw_only(), py::arg("d_logits"), py::arg("loss_mask"),
          py::arg("advantages"), py::arg("old_logprobs"), py::arg("denominator"), py::arg("clip_low"), py::arg("clip_high"),
          py::arg("all_metrics"), py::arg("logprobs"), py::arg("entropy"), py::arg("stream"));
    m.def("turn_returns", &turn_returns, py::arg("turns"), py::kw_only(), py::arg("gamma"), py::arg("returns"),
          py::arg("stream"));
    m.def("turn_advantages", &turn_advantages, py::arg("turns"), py::kw_only(), py::arg("group_ids"), py::arg("turn_ids"),
          py::arg("anchor_ids"), py::arg("num_tokens"), py::arg("rule"), py::arg("token_counts"), py::arg("exact_returns"),
          py::arg("exact_advantages"), py::arg("wide_results"), py::arg("returns"), py::arg("turn_advantages"),
          py::arg("token_advantages"), py::arg("stream"));
}
