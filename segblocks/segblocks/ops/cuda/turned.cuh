// Products with output channels as rows and pixels as columns: who holds what, and how it is turned
// round into channels side by side.
//
// Thread (r, c) = (lane / 4, lane % 4) of a warp holds, for each eight pixels j, acc[4j .. 4j+3]:
// pixels 2c and 2c + 1 of channel 4 (r / 2) + r % 2 of the warp's 16, then the same pixels two channels
// on. `pack_patch_weights` orders the weights so, for then the transposed pair of matrices is four
// consecutive channels 4c .. 4c+3 of pixel r.
#pragma once

// First of a lane's two channels among the warp's 16; the other is two further.
INLINE int channel_of(int lane) { return lane / 8 * 4 + lane / 4 % 2; }
