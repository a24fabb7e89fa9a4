#include "kernels/flatten_launches.h"

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "check.h"

using fastddp::chunk_numel;
using fastddp::DType;
using fastddp::FlatPass;
using fastddp::flatten_launches;
using fastddp::FlattenLaunch;
using fastddp::kLargeTable;
using fastddp::kMaxSpanNumel;
using fastddp::Piece;
using fastddp::unflatten_launches;

namespace {

constexpr FlatPass kFloats{DType::kFloat32, DType::kFloat32, 1};

// Never read or written: a launch list only computes with addresses.
void* address(std::uint64_t value) { return reinterpret_cast<void*>(value); }

std::uint64_t number(const void* data) { return reinterpret_cast<std::uint64_t>(data); }

// Walks pieces and spans side by side: each element is in exactly one span, in order.
void check_cover(const std::vector<Piece>& pieces,
                 DType piece,
                 DType source,
                 const std::vector<FlattenLaunch>& launches) {
  std::size_t at = 0;      // the piece that is being covered,
  std::int64_t moved = 0;  // and how much of it is
  for (const FlattenLaunch& launch : launches) {
    CHECK(!launch.spans.empty() && launch.spans.size() <= kLargeTable);
    std::uint64_t block = 0;
    for (const auto& span : launch.spans) {
      while (moved == pieces.at(at).numel) ++at, moved = 0;
      const Piece& whole = pieces[at];
      CHECK(span.numel > 0 && moved + span.numel <= whole.numel);
      CHECK(span.offset == whole.offset + moved);
      if (whole.data == nullptr) {
        CHECK(span.data == nullptr);
      } else {
        const auto bytes = static_cast<std::uint64_t>(moved) * size_of(piece);
        CHECK(number(span.data) == number(whole.data) + bytes);
      }
      CHECK(span.first_block == block);
      const std::uint64_t chunk = chunk_numel(source);
      block += (span.numel + chunk - 1) / chunk;
      moved += span.numel;
    }
    CHECK(block == launch.num_blocks);
    CHECK(block < std::uint64_t{1} << 31);  // the limit of a grid
  }
  while (at < pieces.size() && moved == pieces[at].numel) ++at, moved = 0;
  CHECK(at == pieces.size());
}

// Checks a flatten to a flat buffer of that dtype, and an unflatten from it.
void check_cover(const std::vector<Piece>& pieces, DType piece, DType flat) {
  check_cover(pieces, piece, piece, flatten_launches({piece, flat, 1}, pieces));
  check_cover(pieces, piece, flat, unflatten_launches({piece, flat, 1}, pieces));
}

std::vector<Piece> in_a_row(const std::vector<std::int64_t>& sizes) {
  std::vector<Piece> pieces;
  std::int64_t offset = 5;
  std::uint64_t data = 4096;
  for (const std::int64_t numel : sizes) {
    pieces.push_back({address(data), offset, numel});
    offset += numel;
    data += static_cast<std::uint64_t>(numel) * 8;
  }
  return pieces;
}

}  // namespace

TEST(nothing_is_no_launch) {
  CHECK(flatten_launches(kFloats, {}).empty());
  CHECK(flatten_launches(kFloats, in_a_row({0, 0, 0})).empty());
  CHECK(unflatten_launches(kFloats, {{nullptr, 0, 0}}).empty());
}

TEST(every_element_is_moved_once) {
  for (const DType flat : {DType::kFloat64, DType::kFloat32, DType::kBFloat16}) {
    const std::int64_t chunk = chunk_numel(flat);
    const auto pieces = in_a_row({1, 0, chunk - 1, chunk, chunk + 1, 0, 0, 10 * chunk, 3, 0});
    check_cover(pieces, DType::kFloat32, flat);
  }
}

TEST(a_null_piece_stays_null_in_all_its_parts) {
  const std::vector<Piece> pieces{{nullptr, 0, 3 * kMaxSpanNumel}, {nullptr, 3 * kMaxSpanNumel, 1}};
  check_cover(pieces, DType::kFloat32, DType::kFloat32, flatten_launches(kFloats, pieces));
}

TEST(tiny_tensors_share_a_launch_as_far_as_a_table_goes) {
  const auto num_launches = [](std::size_t num_pieces) {
    const auto pieces = in_a_row(std::vector<std::int64_t>(num_pieces, 7));
    check_cover(pieces, DType::kBFloat16, DType::kBFloat16);
    return flatten_launches(kFloats, pieces).size();
  };
  CHECK(num_launches(1) == 1);
  CHECK(num_launches(1300) == 1);
  CHECK(num_launches(kLargeTable) == 1);
  CHECK(num_launches(kLargeTable + 1) == 2);
  CHECK(num_launches(5000) == 4);
}

TEST(tensors_of_more_than_32_bits_are_split) {
  const std::int64_t big = (std::int64_t{1} << 33) + 12345;
  for (const DType dtype : {DType::kFloat64, DType::kFloat32, DType::kFloat16}) {
    check_cover(in_a_row({3, big, 5, kMaxSpanNumel, kMaxSpanNumel + 1, 1}), dtype, dtype);
    // As many blocks as a grid can have, and more: 32 TiB of float64.
    check_cover(in_a_row({std::int64_t{1} << 42}), dtype, dtype);
  }
}

TEST(parts_of_a_split_tensor_begin_with_a_chunk) {
  const auto launches = flatten_launches(kFloats, in_a_row({3 * kMaxSpanNumel + 1}));
  CHECK(launches.size() == 1 && launches[0].spans.size() == 4);
  for (std::size_t part = 0; part < 3; ++part)
    CHECK(launches[0].spans[part].numel % chunk_numel(DType::kBFloat16) == 0);
}

TEST(a_negative_size_is_refused) {
  CHECK_THROWS(flatten_launches(kFloats, {{nullptr, 0, -1}}), std::invalid_argument);
  CHECK_THROWS(unflatten_launches(kFloats, {{address(16), 0, -1}}), std::invalid_argument);
}

TEST(a_null_piece_cannot_be_written) {
  CHECK_THROWS(unflatten_launches(kFloats, {{nullptr, 0, 1}}), std::invalid_argument);
}

int main() { return check::run(); }
