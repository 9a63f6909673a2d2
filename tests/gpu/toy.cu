// A decoder with a cache and an image head of whole numbers, which are exact on any device and in any order:
// for the loop on the device where there is no TensorRT. tests/gpu/toy.py says the same in numpy.
//
// It is compiled behind loop.cu, whose types and functions it uses.

namespace star {

// In the order of `fields` in toy.py; always 16 fields of 64 bits.
struct Toy {
    i64 rows, places, hidden, capacity, codebook, unused[4];
    i64 const* write_indices;  // [rows]
    i64 const* position_ids;   // [3, rows, places]
    float const* from;         // [rows, places, hidden]
    float* cache;              // [rows, 1, capacity, hidden]
    float* to;                 // [rows, places, hidden]
    float const* noise;        // [rows / 2, places, codebook]
    i64* image_ids;            // [rows / 2, places]
};

// A thread is a column of a row: the sum of what the cache holds up to each place, with the place's position.
STAR_DEVICE void toy_decoder(Toy const& toy)
{
    i64 const column = thread(), row = block_x(), at = toy.write_indices[row];
    if (column >= toy.hidden) return;
    float* const cache = toy.cache + row * toy.capacity * toy.hidden + column;
    i64 sum = 0;
    for (i64 slot = 0; slot < at; ++slot) sum += i64(cache[slot * toy.hidden]);
    for (i64 place = row * toy.places; place < (row + 1) * toy.places; ++place) {
        float const new_row = toy.from[place * toy.hidden + column];
        cache[(at + place - row * toy.places) * toy.hidden] = new_row;
        sum += i64(new_row);
        toy.to[place * toy.hidden + column] = float((3 * sum + toy.position_ids[place] + column) % 31);
    }
}

STAR_DEVICE float toy_score(float const* noise, int state, int id)
{
    return noise[id] + float((state * (id + 1) + 7 * id) % 11) * 0.25f;  // an exact product
}

// A block is a place of an image, a thread an id. The one with the best score, the first of equals, is drawn.
STAR_DEVICE void toy_head(Toy const& toy)
{
    int const id = thread();
    i64 const image = block_y(), place = block_x();
    if (id >= toy.codebook) return;
    i64 const row = (2 * image * toy.places + place) * toy.hidden, other = row + toy.places * toy.hidden;
    float const* const noise = toy.noise + (image * toy.places + place) * toy.codebook;
    int state = 0;
    for (int i = 0; i < toy.hidden; ++i) state += (i + 1) * int(toy.from[row + i]) + int(toy.from[other + i]);
    float const mine = toy_score(noise, state, id);
    for (int rival = 0; rival < toy.codebook; ++rival) {
        float const score = toy_score(noise, state, rival);
        if (score > mine || (score == mine && rival < id)) return;
    }
    toy.image_ids[image * toy.places + place] = id;
    for (int i = 0; i < toy.hidden; ++i) toy.to[row + i] = toy.to[other + i] = float((id * (i + 3) + i) % 29);
}

}  // namespace star

#ifndef STAR_EMULATED
extern "C" __global__ void toy_decoder(star::Toy const toy) { star::toy_decoder(toy); }
extern "C" __global__ void toy_head(star::Toy const toy) { star::toy_head(toy); }
#endif
