// Dropout masks, as bits: Philox4x32-7 as philox.py defines it, eight columns a block.
//
// The counter is (block, row, member, 0). Rounds 1 and 2, and half of round 3, depend on the block alone or on the row
// alone; they are done once for a panel of columns, which leaves 4.5 of 7 rounds for each (row, block). States live in
// 64-bit lanes of which only the low half counts: the widening multiply ignores the high half, so the low word of a
// product needs no mask and the high word one shift.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace fastpeft {
namespace FASTPEFT_ISA {

constexpr int PANEL_BLOCKS = 8;  // 64 columns: one AVX-512 register of states
constexpr int PANEL = 8 * PANEL_BLOCKS;

constexpr uint64_t MULTIPLIER_0 = 0xD2511F53, MULTIPLIER_1 = 0xCD9E8D57;
constexpr uint32_t WEYL_0 = 0x9E3779B9, WEYL_1 = 0xBB67AE85;
constexpr int ROUNDS = 7;

// What all rows share, for one member and 64 columns.
struct MaskPanel {
  uint64_t x[PANEL_BLOCKS], y[PANEL_BLOCKS], z[PANEL_BLOCKS], t[PANEL_BLOCKS];  // in the order of the vector's lanes
  uint32_t k0[ROUNDS], k1[ROUNDS];
  uint32_t first_round;  // high word of multiplier 1 times member, xor key 0
  uint32_t threshold;
};

// The block, among the panel's eight, of 64-bit lane `lane` of its vector(s).
FASTPEFT_INLINE int block_of_lane(int lane) {
#if defined(FASTPEFT_AVX512)
  return 4 * (lane % 2) + lane / 2;
#else
  return lane;
#endif
}

static void mask_panel(MaskPanel* panel, const Mask& mask, uint32_t member, int64_t first_column) {
  for (int i = 0; i < ROUNDS; ++i) {
    panel->k0[i] = uint32_t(mask.seed) + uint32_t(i) * WEYL_0;
    panel->k1[i] = uint32_t(mask.seed >> 32) + uint32_t(i) * WEYL_1;
  }
  const uint64_t from_member = MULTIPLIER_1 * member;
  panel->first_round = uint32_t(from_member >> 32) ^ panel->k0[0];
  panel->threshold = mask.threshold;
  for (int lane = 0; lane < PANEL_BLOCKS; ++lane) {
    const uint64_t p0 = MULTIPLIER_0 * uint32_t(first_column / 8 + block_of_lane(lane));
    const uint64_t p1 = MULTIPLIER_1 * (uint32_t(p0 >> 32) ^ panel->k1[0]);
    const uint64_t q0 = MULTIPLIER_0 * (uint32_t(p1 >> 32) ^ uint32_t(from_member) ^ panel->k0[1]);
    panel->x[lane] = uint32_t(p0) ^ panel->k1[1];
    panel->y[lane] = uint32_t(p1) ^ panel->k0[2];
    panel->z[lane] = uint32_t(q0 >> 32) ^ panel->k1[2];
    panel->t[lane] = uint32_t(q0);
  }
}

#if defined(FASTPEFT_AVX512)

FASTPEFT_INLINE __m512i lanes(uint32_t x) { return _mm512_set1_epi32(int32_t(x)); }
FASTPEFT_INLINE __m512i xor3(__m512i a, __m512i b, __m512i c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }

FASTPEFT_INLINE void mask_row(const MaskPanel& panel, uint32_t row, uint8_t* bits) {
  const uint64_t r = MULTIPLIER_0 * (panel.first_round ^ row);
  const __m512i m0 = lanes(uint32_t(MULTIPLIER_0)), m1 = lanes(uint32_t(MULTIPLIER_1));
  const __m512i p = _mm512_mul_epu32(_mm512_xor_si512(_mm512_loadu_si512(panel.x), lanes(uint32_t(r >> 32))), m1);
  __m512i c0 = _mm512_xor_si512(_mm512_srli_epi64(p, 32), _mm512_loadu_si512(panel.y)), c1 = p;
  __m512i c2 = _mm512_xor_si512(_mm512_loadu_si512(panel.z), lanes(uint32_t(r))), c3 = _mm512_loadu_si512(panel.t);
#pragma GCC unroll 4
  for (int i = 3; i < ROUNDS; ++i) {
    const __m512i p0 = _mm512_mul_epu32(c0, m0), p1 = _mm512_mul_epu32(c2, m1);
    c0 = xor3(_mm512_srli_epi64(p1, 32), c1, lanes(panel.k0[i]));
    c2 = xor3(_mm512_srli_epi64(p0, 32), c3, lanes(panel.k1[i]));
    c1 = p1;
    c3 = p0;
  }
  // Words 0,1 and 2,3 side by side, then whole blocks side by side: 16-bit values in the order of the columns.
  const __m512i low = _mm512_mask_shuffle_epi32(c0, 0xAAAA, c1, _MM_PERM_CCAA);
  const __m512i high = _mm512_mask_shuffle_epi32(c2, 0xAAAA, c3, _MM_PERM_CCAA);
  const __m512i threshold = _mm512_set1_epi16(int16_t(panel.threshold));
  const uint32_t left = _mm512_cmpge_epu16_mask(_mm512_unpacklo_epi64(low, high), threshold);
  const uint32_t right = _mm512_cmpge_epu16_mask(_mm512_unpackhi_epi64(low, high), threshold);
  memcpy(bits, &left, 4);
  memcpy(bits + 4, &right, 4);
}

#elif defined(FASTPEFT_AVX2)

FASTPEFT_INLINE __m256i lanes(uint32_t x) { return _mm256_set1_epi32(int32_t(x)); }
FASTPEFT_INLINE __m256i at(const uint64_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
FASTPEFT_INLINE __m256i xor3(__m256i a, __m256i b, __m256i c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }

FASTPEFT_INLINE void mask_row(const MaskPanel& panel, uint32_t row, uint8_t* bits) {
  const uint64_t r = MULTIPLIER_0 * (panel.first_round ^ row);
  const __m256i m0 = lanes(uint32_t(MULTIPLIER_0)), m1 = lanes(uint32_t(MULTIPLIER_1));
  const __m256i threshold = _mm256_set1_epi16(int16_t(panel.threshold));
  for (int half = 0; half < PANEL_BLOCKS; half += 4) {
    const __m256i p = _mm256_mul_epu32(_mm256_xor_si256(at(panel.x + half), lanes(uint32_t(r >> 32))), m1);
    __m256i c0 = _mm256_xor_si256(_mm256_srli_epi64(p, 32), at(panel.y + half)), c1 = p;
    __m256i c2 = _mm256_xor_si256(at(panel.z + half), lanes(uint32_t(r))), c3 = at(panel.t + half);
#pragma GCC unroll 4
    for (int i = 3; i < ROUNDS; ++i) {
      const __m256i p0 = _mm256_mul_epu32(c0, m0), p1 = _mm256_mul_epu32(c2, m1);
      c0 = xor3(_mm256_srli_epi64(p1, 32), c1, lanes(panel.k0[i]));
      c2 = xor3(_mm256_srli_epi64(p0, 32), c3, lanes(panel.k1[i]));
      c1 = p1;
      c3 = p0;
    }
    const __m256i low = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xAA);
    const __m256i high = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xAA);
    const __m256i even = _mm256_unpacklo_epi64(low, high), odd = _mm256_unpackhi_epi64(low, high);
    const __m256i even_kept = _mm256_cmpeq_epi16(_mm256_max_epu16(even, threshold), even);
    const __m256i odd_kept = _mm256_cmpeq_epi16(_mm256_max_epu16(odd, threshold), odd);
    const int32_t kept = _mm256_movemask_epi8(_mm256_packs_epi16(even_kept, odd_kept));
    memcpy(bits + half, &kept, 4);
  }
}

#else

static void mask_row(const MaskPanel& panel, uint32_t row, uint8_t* bits) {
  const uint64_t r = MULTIPLIER_0 * (panel.first_round ^ row);
  for (int block = 0; block < PANEL_BLOCKS; ++block) {
    const uint64_t p = MULTIPLIER_1 * uint32_t(panel.x[block] ^ (r >> 32));
    uint32_t c0 = uint32_t(p >> 32) ^ uint32_t(panel.y[block]), c1 = uint32_t(p);
    uint32_t c2 = uint32_t(panel.z[block]) ^ uint32_t(r), c3 = uint32_t(panel.t[block]);
    for (int i = 3; i < ROUNDS; ++i) {
      const uint64_t p0 = MULTIPLIER_0 * c0, p1 = MULTIPLIER_1 * c2;
      c0 = uint32_t(p1 >> 32) ^ c1 ^ panel.k0[i];
      c2 = uint32_t(p0 >> 32) ^ c3 ^ panel.k1[i];
      c1 = uint32_t(p1);
      c3 = uint32_t(p0);
    }
    const uint32_t words[4] = {c0, c1, c2, c3};
    uint32_t kept = 0;
    for (int i = 0; i < 8; ++i) kept |= uint32_t((words[i / 2] >> (16 * (i % 2)) & 0xffff) >= panel.threshold) << i;
    bits[block] = uint8_t(kept);
  }
}

#endif

// Bits of rows row … row + rows, eight bytes a row.
static void mask_rows(const MaskPanel& panel, int64_t row, int64_t rows, uint8_t* bits) {
  if (panel.threshold > 0xffff) {
    memset(bits, 0, rows * PANEL_BLOCKS);
    return;
  }
  for (int64_t i = 0; i < rows; ++i) mask_row(panel, uint32_t(row + i), bits + i * PANEL_BLOCKS);
}

}  // namespace FASTPEFT_ISA
}  // namespace fastpeft
