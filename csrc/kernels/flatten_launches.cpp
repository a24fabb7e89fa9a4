#include "kernels/flatten_launches.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace fastddp {
namespace {

std::vector<FlattenLaunch> launches_of(const std::vector<Piece>& pieces,
                                       DType piece,
                                       DType source) {
  const std::int64_t chunk = chunk_numel(source);
  std::vector<FlattenLaunch> launches;
  for (const Piece& whole : pieces) {
    if (whole.numel < 0)
      throw std::invalid_argument("a piece has " + std::to_string(whole.numel) + " elements");
    auto* data = static_cast<char*>(whole.data);
    for (std::int64_t begin = 0; begin < whole.numel; begin += kMaxSpanNumel) {
      if (launches.empty() || launches.back().spans.size() == kLargeTable) {
        launches.push_back({{}, 0});
        launches.back().spans.reserve(std::min<std::size_t>(pieces.size(), kLargeTable));
      }
      FlattenLaunch& launch = launches.back();
      const std::int64_t numel = std::min(whole.numel - begin, kMaxSpanNumel);
      launch.spans.push_back(
          {data, whole.offset + begin, static_cast<std::uint32_t>(numel), launch.num_blocks});
      launch.num_blocks += static_cast<std::uint32_t>((numel + chunk - 1) / chunk);
      if (data != nullptr) data += numel * static_cast<std::int64_t>(size_of(piece));
    }
  }
  return launches;
}

}  // namespace

std::vector<FlattenLaunch> flatten_launches(const FlatPass& pass,
                                            const std::vector<Piece>& pieces) {
  return launches_of(pieces, pass.piece, pass.piece);
}

std::vector<FlattenLaunch> unflatten_launches(const FlatPass& pass,
                                              const std::vector<Piece>& pieces) {
  for (std::size_t i = 0; i < pieces.size(); ++i) {
    if (pieces[i].data == nullptr && pieces[i].numel != 0)
      throw std::invalid_argument("piece " + std::to_string(i) + " of " +
                                  std::to_string(pieces[i].numel) +
                                  " elements is null: there is no memory to write to");
  }
  return launches_of(pieces, pass.piece, pass.flat);
}

}  // namespace fastddp
