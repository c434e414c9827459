// The master problem of the cutting-plane method: a linear program with n_resources + 1 rows and a column for each cut,
// small enough that the basis is factored afresh at every pivot, which keeps it accurate.
#include <algorithm>
#include <cmath>
#include <utility>

#include "layerlens/knapsack.hpp"

namespace layerlens::knapsack {

namespace {

constexpr int kMaxRows = kMaxResources + 1;
constexpr int kMaxPivots = 2000;
// After so many pivots Bland's rule takes over, which cannot cycle.
constexpr int kDantzigPivots = 200;

struct Master {
  int m;
  int n_cuts;
  const double* value;
  const double* use__kr;
  const double* low;
  const double* high;

  double objective(int column) const {
    if (column >= 0) return value[column];
    const int side = -1 - column;
    return side < m ? low[side] : -high[side - m];
  }

  void fill(int column, double* entries) const {
    std::fill(entries, entries + m + 1, 0.0);
    if (column >= 0) {
      std::copy(use__kr + column * m, use__kr + (column + 1) * m, entries);
      entries[m] = 1.0;
    } else if (-1 - column < m) {
      entries[-1 - column] = 1.0;
    } else {
      entries[-1 - column - m] = -1.0;
    }
  }
};

// Inverts the n x n matrix by Gauss-Jordan elimination with row pivoting; false when it is singular.
bool invert(int n, double matrix[kMaxRows][kMaxRows], double inverse[kMaxRows][kMaxRows]) {
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < n; ++j) inverse[i][j] = i == j ? 1.0 : 0.0;
  for (int column = 0; column < n; ++column) {
    int pivot = column;
    for (int i = column + 1; i < n; ++i)
      if (std::fabs(matrix[i][column]) > std::fabs(matrix[pivot][column])) pivot = i;
    if (std::fabs(matrix[pivot][column]) < 1e-13) return false;
    if (pivot != column) {
      std::swap_ranges(matrix[pivot], matrix[pivot] + n, matrix[column]);
      std::swap_ranges(inverse[pivot], inverse[pivot] + n, inverse[column]);
    }
    const double scale = 1.0 / matrix[column][column];
    for (int j = 0; j < n; ++j) {
      matrix[column][j] *= scale;
      inverse[column][j] *= scale;
    }
    for (int i = 0; i < n; ++i) {
      const double factor = matrix[i][column];
      if (i == column || factor == 0.0) continue;
      for (int j = 0; j < n; ++j) {
        matrix[i][j] -= factor * matrix[column][j];
        inverse[i][j] -= factor * inverse[column][j];
      }
    }
  }
  return true;
}

}  // namespace

void first_basis(int n_resources, int cut, const double* use, int* basis) {
  for (int r = 0; r < n_resources; ++r) basis[r] = use[r] <= 1.0 ? -1 - r : -1 - n_resources - r;
  basis[n_resources] = cut;
}

double solve_master(int n_resources, int n_cuts, const double* value, const double* use__kr, const double* low,
                    const double* high, int* basis, double* lambda, double* weight) {
  const Master master{n_resources, n_cuts, value, use__kr, low, high};
  const int m = n_resources, rows = m + 1;
  double size = 0.0;
  for (int k = 0; k < n_cuts; ++k) size = std::max(size, std::fabs(value[k]));
  for (int r = 0; r < m; ++r) size = std::max(size, std::max(std::fabs(low[r]), std::fabs(high[r])));
  const double tolerance = 1e-13 * size;

  double matrix[kMaxRows][kMaxRows], inverse[kMaxRows][kMaxRows], column[kMaxRows], step[kMaxRows];
  for (int pivots = 0; pivots < kMaxPivots; ++pivots) {
    for (int j = 0; j < rows; ++j) {
      master.fill(basis[j], column);
      for (int i = 0; i < rows; ++i) matrix[i][j] = column[i];
    }
    if (!invert(rows, matrix, inverse)) return -HUGE_VAL;

    double dual[kMaxRows], optimum = 0.0;  // lambda and theta
    for (int i = 0; i < rows; ++i) {
      dual[i] = 0.0;
      weight[i] = 0.0;
      for (int j = 0; j < rows; ++j) {
        dual[i] += master.objective(basis[j]) * inverse[j][i];
        weight[i] += inverse[i][j];  // the right-hand side is all ones
      }
    }
    for (int i = 0; i < rows; ++i) optimum += dual[i];
    std::copy(dual, dual + m, lambda);

    const bool bland = pivots >= kDantzigPivots;
    int entering = 0;
    double gain = tolerance;
    bool found = false;
    for (int c = -2 * m; c < n_cuts; ++c) {
      double reduced;
      if (c >= 0) {
        reduced = value[c] - dual[m];
        for (int r = 0; r < m; ++r) reduced -= dual[r] * use__kr[c * m + r];
      } else {
        const int side = -1 - c;
        reduced = side < m ? low[side] - dual[side] : dual[side - m] - high[side - m];
      }
      if (reduced > gain) {
        entering = c;
        found = true;
        if (bland) break;
        gain = reduced;
      }
    }
    if (!found) return optimum;

    master.fill(entering, column);
    int leaving = -1;
    double ratio = HUGE_VAL;
    for (int i = 0; i < rows; ++i) {
      step[i] = 0.0;
      for (int j = 0; j < rows; ++j) step[i] += inverse[i][j] * column[j];
      if (step[i] <= 1e-11) continue;
      const double here = std::max(weight[i], 0.0) / step[i];
      if (here < ratio || (here == ratio && basis[i] < basis[leaving])) {
        ratio = here;
        leaving = i;
      }
    }
    if (leaving < 0) return -HUGE_VAL;
    basis[leaving] = entering;
  }
  return -HUGE_VAL;
}

}  // namespace layerlens::knapsack
