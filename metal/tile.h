// Matrices that a simdgroup holds in its registers, cut into 8x8 fragments.
//
// A lane holds two neighbouring elements of a row of every fragment, in float32, at
// (fragment_row(lane), fragment_column(lane)) and the column after it. Which lane holds
// what differs between GPUs, and so does how fragments are multiplied: tile_metal.h and
// tile_cuda.h say it. Everything else about tiles is here and the same everywhere.
//
// The right side of a product stays in threadgroup memory, in rows of `pitch` elements.

template <int ROWS, int COLUMNS>
struct Tile {
  float2 at[ROWS / 8][COLUMNS / 8];
};

template <int ROWS, int COLUMNS>
inline void fill(thread Tile<ROWS, COLUMNS>& tile, float value) {
#pragma unroll
  for (int i = 0; i < ROWS / 8; ++i) {
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; ++j) {
      tile.at[i][j].x = value;
      tile.at[i][j].y = value;
    }
  }
}

// tile[r, c] = source[r * row_stride + c * column_stride]
template <int ROWS, int COLUMNS, typename Pointer>
inline void load(
    thread Tile<ROWS, COLUMNS>& tile,
    Pointer source,
    uint row_stride,
    uint column_stride,
    uint lane) {
  source += fragment_row(lane) * row_stride + fragment_column(lane) * column_stride;
#pragma unroll
  for (int i = 0; i < ROWS / 8; ++i) {
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; ++j) {
      const uint at = 8 * i * row_stride + 8 * j * column_stride;
      tile.at[i][j].x = float(source[at]);
      tile.at[i][j].y = float(source[at + column_stride]);
    }
  }
}

// target[r * row_stride + c * column_stride] = tile[r, c] for the first `columns` columns
template <int ROWS, int COLUMNS, typename T>
inline void store(
    const thread Tile<ROWS, COLUMNS>& tile,
    device T* target,
    uint row_stride,
    uint column_stride,
    uint columns,
    uint lane) {
  const uint column = fragment_column(lane);
  target += fragment_row(lane) * row_stride + column * column_stride;
#pragma unroll
  for (int i = 0; i < ROWS / 8; ++i) {
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; ++j) {
      const uint at = 8 * i * row_stride + 8 * j * column_stride;
      if (8 * j + column < columns) {
        target[at] = T(tile.at[i][j].x);
      }
      if (8 * j + column + 1 < columns) {
        target[at + column_stride] = T(tile.at[i][j].y);
      }
    }
  }
}

// tile[r, c] *= factors[c]
template <int ROWS, int COLUMNS>
inline void scale_columns(
    thread Tile<ROWS, COLUMNS>& tile, const threadgroup float* factors, uint lane) {
  factors += fragment_column(lane);
#pragma unroll
  for (int j = 0; j < COLUMNS / 8; ++j) {
    const float x = factors[8 * j];
    const float y = factors[8 * j + 1];
#pragma unroll
    for (int i = 0; i < ROWS / 8; ++i) {
      tile.at[i][j].x *= x;
      tile.at[i][j].y *= y;
    }
  }
}

// tile[r, c] *= factors[r]
template <int ROWS, int COLUMNS>
inline void scale_rows(
    thread Tile<ROWS, COLUMNS>& tile, const threadgroup float* factors, uint lane) {
  factors += fragment_row(lane);
#pragma unroll
  for (int i = 0; i < ROWS / 8; ++i) {
    const float factor = factors[8 * i];
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; ++j) {
      tile.at[i][j].x *= factor;
      tile.at[i][j].y *= factor;
    }
  }
}

// sums[r] = sum over c of tile[r, c] other[r * row_stride + c]
template <int ROWS, int COLUMNS, typename T, typename Sum>
inline void row_products(
    const thread Tile<ROWS, COLUMNS>& tile,
    const device T* other,
    uint row_stride,
    device Sum* sums,
    uint lane) {
  const uint row = fragment_row(lane);
  other += row * row_stride + fragment_column(lane);
#pragma unroll
  for (int i = 0; i < ROWS / 8; ++i) {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; ++j) {
      const float2 pair = load_pair(other + 8 * i * row_stride + 8 * j);
      sum += tile.at[i][j].x * pair.x + tile.at[i][j].y * pair.y;
    }
    sum = sum_of_row(sum);
    if (fragment_column(lane) == 0) {
      sums[8 * i + row] = Sum(sum);
    }
  }
}
