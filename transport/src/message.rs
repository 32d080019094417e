mod outbox;
mod parcel;
