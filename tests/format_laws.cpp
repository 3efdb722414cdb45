// Whether the split formats of csrc/accumulate_math.h obey their laws, over all bit patterns of a float. Compiled and
// run by test_formats.py: `format_laws split24|split32 THREADS` prints how many patterns break a law.
#include <atomic>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "accumulate_math.h"

using namespace accumkern;

// Whether decode_pair and encode_pair do to two neighbours what decode and encode do to each. A pattern serves as a float
// to encode, and as a sum (upper half) with a residual (below it) to decode, stale and impossible pairs included.
template <class F>
static bool pairs_like_one_by_one(uint32_t first, uint32_t second) {
  using Residual = typename F::Residual;
  constexpr int kResidualBits = 8 * sizeof(Residual);
  uint16_t sum[2];
  Residual residual[2];
  F::encode(canonical_bits(float_of(first)), &sum[0], &residual[0]);
  F::encode(canonical_bits(float_of(second)), &sum[1], &residual[1]);
  uint32_t sums;
  typename F::ResidualPair residuals;
  F::encode_pair(canonical_bits(float_of(first)), canonical_bits(float_of(second)), &sums, &residuals);
  if (memcmp(&sums, sum, sizeof sums) != 0 || memcmp(&residuals, residual, sizeof residuals) != 0) return false;

  const uint32_t patterns[2] = {first, second};
  for (int i = 0; i < 2; ++i) {
    sum[i] = static_cast<uint16_t>(patterns[i] >> 16);
    residual[i] = static_cast<Residual>((patterns[i] >> (16 - kResidualBits)) & ((1u << kResidualBits) - 1));
  }
  memcpy(&sums, sum, sizeof sums);
  memcpy(&residuals, residual, sizeof residuals);
  float decoded[2];
  F::decode_pair(sums, residuals, &decoded[0], &decoded[1]);
  return bits_of(decoded[0]) == bits_of(F::decode(sum[0], residual[0])) &&
         bits_of(decoded[1]) == bits_of(F::decode(sum[1], residual[1]));
}

// split32: decode(encode(x)) == x bit for bit, and the sum is x rounded to bfloat16 but for ties, which may go away
// from zero. split24: the error is at most 2^-16 |x| for normal x (half a last place for subnormal x), and the sum is
// x rounded to bfloat16 to half a last place and 2^-8 of one. Both: NaN becomes (0x7FC0, 0), and encoding what was
// decoded changes nothing. Two at a time, the same comes out as one by one.
template <class F>
static bool obeys_law(uint32_t pattern) {
  // Multiplied by an odd number: over all patterns, all are in the other place too.
  if (!pairs_like_one_by_one<F>(pattern, pattern * 2654435761u)) return false;

  uint16_t sum;
  typename F::Residual residual;
  F::encode(canonical_bits(float_of(pattern)), &sum, &residual);
  const uint32_t magnitude = pattern & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return sum == 0x7FC0u && residual == 0;

  const uint32_t decoded = bits_of(F::decode(sum, residual));
  uint16_t sum_again;
  typename F::Residual residual_again;
  F::encode(decoded, &sum_again, &residual_again);
  if (sum_again != sum || residual_again != residual) return false;
  if ((decoded ^ pattern) >> 31) return false;  // the sign is kept, of zeros too

  // In units of the last place, differences of bit patterns are differences of values: the patterns of one sign are
  // in the order of the values, and across a power of two the spacing only doubles.
  const int64_t kept_bits = sizeof(typename F::Residual) == 1 ? 8 : 0;
  const int64_t decoded_error = std::abs(static_cast<int64_t>(decoded & 0x7FFFFFFFu) - static_cast<int64_t>(magnitude));
  if (decoded_error > (kept_bits == 8 ? 0x80 : 0)) return false;
  const int64_t sum_magnitude = static_cast<int64_t>(sum & 0x7FFFu) << 16;
  const int64_t sum_error = std::abs(sum_magnitude - static_cast<int64_t>(magnitude));
  if (sum_error > (kept_bits == 8 ? 0x8080 : 0x8000)) return false;
  if (magnitude == 0x7F800000u || magnitude == 0) return decoded == pattern && residual == 0;
  if (kept_bits == 8 && magnitude >= 0x00800000u && (decoded & 0x7FFFFFFFu) < 0x7F800000u) {
    const double x = float_of(pattern), y = float_of(decoded);
    if (std::fabs(y - x) > std::fabs(x) * 0x1p-16) return false;
  }
  return true;
}

template <class F>
static uint64_t count_failures(int threads) {
  constexpr uint64_t kPatterns = uint64_t{1} << 32;
  std::atomic<uint64_t> failures{0};
  std::vector<std::thread> workers;
  for (int worker = 0; worker < threads; ++worker) {
    workers.emplace_back([&, worker] {
      const uint64_t last = kPatterns * (worker + 1) / threads;
      uint64_t found = 0;
      for (uint64_t pattern = kPatterns * worker / threads; pattern < last; ++pattern) {
        found += !obeys_law<F>(static_cast<uint32_t>(pattern));
      }
      failures += found;
    });
  }
  for (std::thread& worker : workers) worker.join();
  return failures;
}

int main(int count, char** arguments) {
  const std::string format = count == 3 ? arguments[1] : "";
  if (format != "split24" && format != "split32") return 2;
  const int threads = std::atoi(arguments[2]);
  std::printf("%" PRIu64 "\n", format == "split24" ? count_failures<Split24>(threads) : count_failures<Split32>(threads));
}
