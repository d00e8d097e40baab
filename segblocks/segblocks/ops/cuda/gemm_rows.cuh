// Where the rows of a product over both resolutions lie (see tables.cu for their order).
#pragma once

// A quad of a high block, or a pixel of a low one, in its block; rank: of the block among those of its
// resolution.
struct Spot {
    int rank, y, x;
};

// The logarithm of a side that is a power of two; -1: it is none.
INLINE int shift_of(int side) { return side & (side - 1) ? -1 : 31 - __clz(side); }

// The index-th one, of blocks with `side` of them in a line; shift: `shift_of` that side.
INLINE Spot spot_at(int index, int side, int shift) {
    auto divided = [&](int n) { return shift >= 0 ? n >> shift : n / side; };
    int line = divided(index), rank = divided(line);
    return {rank, line - rank * side, index - line * side};
}
