// The ways to ask for cache lines before they are needed; apart, since the files of one instruction set take no std
// library.
#pragma once

namespace layerlens {

enum class Reading : int {
  page_ahead = 0,   // the lines a page further, into the first cache: the hardware's own streams end at every page
  hardware = 1,     // none: where asking holds up the loads, or the hardware's streams cross pages
  second_cache = 2  // the lines two pages further, into the second cache
};

constexpr int reading_count = 3;

}  // namespace layerlens
