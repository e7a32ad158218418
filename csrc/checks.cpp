#include "checks.h"

#include <stdexcept>

#include "pack.h"
#include "winograd.h"

namespace den {

void fail(const std::string& message) { throw std::invalid_argument(message); }

std::string entry(const char* name, int i) { return std::string(name) + "[" + std::to_string(i) + "]"; }

void check_widths(const char* name, const int* width, int samples, int channels, int groups) {
    const int step = groups > 1 ? channels / groups : 1;
    for (int n = 0; n < samples; ++n) {
        const auto is = [&] { return entry(name, n) + " is " + std::to_string(width[n]); };
        if (width[n] < 0 || width[n] > channels)
            fail(is() + "; it must be between 0 and the " + std::to_string(channels) + " channels of the tensor");
        if (width[n] % step != 0)
            fail(is() + "; with groups=" + std::to_string(groups) + " it must be a multiple of " + std::to_string(step) +
                 " channels");
    }
}

void check_levels(const char* name, const int* widths, int levels, int channels, int groups, int least) {
    check_widths(name, widths, levels, channels, groups);
    for (int l = 0; l < levels; ++l)
        if (widths[l] < (l ? widths[l - 1] : least))
            fail(entry(name, l) + " is " + std::to_string(widths[l]) + "; it must be at least " +
                 (l ? entry(name, l - 1) + ", which is " + std::to_string(widths[l - 1]) : std::to_string(least)));
}

void check_plan(const ResidualBlock& block) {
    for (int n = 0; n < block.samples; ++n)
        if (block.level[n] < 0 || block.level[n] >= block.levels)
            fail(entry("level", n) + " is " + std::to_string(block.level[n]) + "; it must be between 0 and " +
                 std::to_string(block.levels - 1));
    std::vector<char> seen(block.samples, 0);
    for (int i = 0; i < block.samples; ++i) {
        const int n = block.order[i];
        if (n < 0 || n >= block.samples || seen[n])
            fail(entry("order", i) + " is " + std::to_string(n) + "; order must hold each of the " +
                 std::to_string(block.samples) + " samples once");
        seen[n] = 1;
    }
}

std::size_t packed_values(const std::string& dtype, int out_channels, int group_in, int taps, int groups) {
    std::size_t values = 0;
    with_element(dtype, [&](auto element) {
        values = packed_elements<decltype(element)>(out_channels, group_in, taps, groups);
    });
    return values;
}

std::size_t winograd_packed_values(const std::string& dtype, int tile, int out_channels, int group_in, int groups) {
    std::size_t values = 0;
    with_element(dtype, [&](auto element) {
        using T = decltype(element);
        values = groups * winograd_packed_words<T>(tile, out_channels / groups, group_in) * winograd_word<T>(tile);
    });
    return values;
}

int packed_as(const std::string& dtype, std::int64_t values, int i, int in_channels, const BlockConv& conv) {
    const int columns = conv.lines ? conv.kernel : 1;  // that count as channels
    const int group_in = in_channels / conv.groups * columns, taps = conv.kernel * conv.kernel / columns;
    if (values == std::int64_t(packed_values(dtype, conv.out_channels, group_in, taps, conv.groups))) return 0;
    bool takes = false;
    with_element(dtype, [&](auto element) {
        takes = winograd_takes<decltype(element)>(conv.groups, conv.out_channels / conv.groups, group_in);
    });
    if (conv.kernel == 3 && conv.stride == 1 && takes)
        for (int tile : {4, 2})
            if (values == std::int64_t(winograd_packed_values(dtype, tile, conv.out_channels, group_in, conv.groups)))
                return tile;
    fail(entry("weight", i) + " must be packed by this backend's pack_weight for " + std::to_string(in_channels) + " -> " +
         std::to_string(conv.out_channels) + " channels, got " + std::to_string(values) + " values");
}

}  // namespace den
