// Memory of one thread that is kept from call to call. Not a std::vector: its functions would be compiled once an
// instruction set under one name, and the linker, which keeps any one of them, could give a processor code that it
// lacks.
#pragma once

#include <cstdint>

namespace efft::EFFT_ISA {

// Grown, never shrunk: a fresh allocation of this size would fault in its pages on every call.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { delete[] data_; }

  // Room for `size` elements, whatever is in it.
  T* room(int64_t size) {
    if (size > size_) {
      delete[] data_;
      data_ = nullptr;
      size_ = 0;
      data_ = new T[size];
      size_ = size;
    }
    return data_;
  }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace efft::EFFT_ISA
