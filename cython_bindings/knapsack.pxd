# Retells cpp/include/layerlens/knapsack.hpp.
from libc.stdint cimport int64_t, uint64_t

from layerlens.kernels._dispatch cimport Isa


cdef extern from "layerlens/knapsack.hpp" namespace "layerlens::knapsack" nogil:
    const int kMaxResources

    cdef struct Instance:
        int64_t n_groups
        int n_resources
        const int64_t* offset
        const double* value
        const double* const* cost
        const double* capacity

    cdef struct Core:
        int64_t n_groups
        int n_resources
        const int64_t* offset
        const double* value
        const double* cost__cr
        const double* capacity

    cdef struct Use:
        double high
        double low

    cdef struct RowSummary:
        double lowest
        double highest
        double sum_of_lowest
        double sum_of_highest
        double not_finite

    RowSummary summarise_row(int64_t n_groups, const int64_t* offset, const double* row, int threads)
    void score_groups(Isa, const Instance&, const double* price, int64_t* choice, double* best, double* totals,
                      int threads)
    int64_t select_reachable(const Instance&, const double* price, const double* reach, const int64_t* choice,
                             const double* best, int64_t* option, int64_t* count, int threads)
    int64_t select_core(const Instance&, const double* price, const double* best, double limit, int64_t room,
                        int64_t* option, double* regret)
    void first_basis(int n_resources, int cut, const double* use, int* basis)
    double solve_master(int n_resources, int n_cuts, const double* value, const double* use__kr, const double* low,
                        const double* high, int* basis, double* multiplier, double* weight)
    void add_use(Use&, double amount)
    Use sum_use(int64_t n, const double* amount)
    bint repair(const Core&, const double* price, int64_t* choice, Use* use)
    void improve(const Core&, const double* price, int64_t pair_limit, int64_t* choice, Use* use)

    int64_t group_hulls(int64_t n_groups, const int64_t* offset, const double* value, const double* cost,
                        int64_t* hull, int64_t* length, int threads)

    cdef struct Charges:
        int64_t n_items
        int64_t n_nodes
        int64_t n_parts
        int64_t n_stages
        int64_t n_switches
        const int64_t* node_begin
        const int64_t* row_begin
        const int64_t* child
        const int64_t* stage
        const int64_t* root
        const int64_t* stage_item
        const int64_t* switch_root

    void score_modes(const Charges&, const double* best, double* value, double* by_stage, double* mode_score)
    int64_t items_of_mode(const Charges&, const double* value, int64_t mode, int64_t* stack, int64_t* item)
    void item_totals(const Instance&, const int64_t* choice, const int64_t* item, int64_t n_items, double* totals)

    cdef struct BeamSettings:
        int64_t width
        double softness
        uint64_t seed

    cdef struct BeamResult:
        double value
        double bound
        int64_t truncations
        int64_t work

    BeamResult beam_search(const Core&, const BeamSettings&, const double* price, const int64_t* favourite,
                           double threshold, int64_t* choice)
