// Eight half-precision channels, one 16-byte access, as floats.
#pragma once
#include "dtypes.cuh"

INLINE void unpack_eight(const uint4& v, float (&to)[8]) {
    unpack_pair(v.x, to[0], to[1]);
    unpack_pair(v.y, to[2], to[3]);
    unpack_pair(v.z, to[4], to[5]);
    unpack_pair(v.w, to[6], to[7]);
}

INLINE uint4 pack_eight(const float (&v)[8]) {
    return make_uint4(pack_pair(v[0], v[1]), pack_pair(v[2], v[3]), pack_pair(v[4], v[5]),
                      pack_pair(v[6], v[7]));
}

INLINE void load_eight(const float* from, float (&v)[8]) {
    float4 a = __ldg((const float4*)from), b = __ldg((const float4*)from + 1);
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}
